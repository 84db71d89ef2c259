"""The table of steps: every step of the configuration, its packages and its files."""

import re
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path
from typing import get_args

import pytest
from packaging.requirements import Requirement
from pydantic import TypeAdapter

from data_pipelines.steps.table import STEPS, package_problems
from llmtrain.config.pipelines.quality import QualityStep, RuleName
from llmtrain.config.pipelines.steps import AnyStep, StepConfig

ROOT = Path(__file__).resolve().parents[4]
OVER_GROUPS = {"exact_dedup", "near_dedup"}
STEPS_OF = TypeAdapter(list[AnyStep])

ALL_ON: list[dict[str, dict[str, object]]] = [
    {"normalize": {"ftfy": True}},
    {"html": {}},
    {"html": {"extractor": "trafilatura"}},
    {"language": {}},
    {"quality": {}},
    {"length": {}},
    {"pii": {}},
    {"words": {"files": ["w"]}},
    {"urls": {"domains": ["d"], "urls": ["u"], "words": ["v"]}},
    {"decontaminate": {"files": ["e", "f"]}},
    {"near_dedup": {}},
]


def test_every_step_over_one_document_has_a_row() -> None:
    assert STEPS.keys() == StepConfig.model_fields.keys() - OVER_GROUPS


def test_packages_are_in_the_extras_that_are_named() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for step in STEPS_OF.validate_python(ALL_ON):
        for package, extra in STEPS[step.name].packages(step.section).items() if step.name in STEPS else ():
            assert package in {Requirement(line).name for line in extras[extra]}
            assert find_spec(package), package


def test_missing_packages_are_named_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_pipelines.steps.table.find_spec", lambda name: None)
    problems = package_problems(STEPS_OF.validate_python(ALL_ON))
    assert list(map(str, problems)) == [
        "steps.0.normalize: needs the package ftfy: pip install 'llmtrain[data]'.",
        "steps.1.html: needs the package resiliparse: pip install 'llmtrain[data]'.",
        "steps.2.html: needs the package trafilatura: pip install 'llmtrain[trafilatura]'.",
        "steps.3.language: needs the package py3langid: pip install 'llmtrain[data]'.",
        "steps.6.pii: needs the package phonenumbers: pip install 'llmtrain[data]'.",
    ]


def test_packages_that_are_not_needed_are_not_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_pipelines.steps.table.find_spec", lambda name: None)
    assert (
        package_problems(STEPS_OF.validate_python(["normalize", "quality", "length", {"pii": {"phones": False}}])) == []
    )


def test_files_that_a_result_depends_on() -> None:
    files = {
        step.name: STEPS[step.name].files(step.section)
        for step in STEPS_OF.validate_python(ALL_ON)
        if step.name in STEPS
    }
    assert {name: found for name, found in files.items() if found} == {
        "words": ("w",),
        "urls": ("d", "u", "v"),
        "decontaminate": ("e", "f"),
    }


def test_importing_the_table_loads_none_of_the_packages() -> None:
    code = "import sys, data_pipelines.steps.table; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    loaded = set(done.stdout.split())
    assert "data_pipelines.steps.main_text" in loaded
    assert not loaded & {"ftfy", "resiliparse", "trafilatura", "py3langid", "phonenumbers", "torch", "lxml"}


def test_the_page_names_every_key_and_every_reason() -> None:
    page = (ROOT / "docs" / "data-steps.md").read_text("utf-8")
    rows = {line.split("`")[1]: line for line in page.splitlines() if line.startswith("| `")}
    for name in STEPS:
        section = StepConfig.model_fields[name].annotation
        keys = next(kind for kind in get_args(section) if kind is not type(None)).model_fields
        assert {key for key in keys if f"`{key}`" not in rows[name]} - set(get_args(RuleName)) == set(), name
    for name in get_args(RuleName):
        keys = type(getattr(QualityStep(), name)).model_fields
        assert {key for key in keys if f"`{key}`" not in page} == set(), name
    sources = "\n".join(path.read_text("utf-8") for path in sorted((ROOT / "data_pipelines" / "steps").rglob("*.py")))
    reasons = set(re.findall(r"Dropped\(\"(\w+)\"\)", sources)) | set(re.findall(r"return \"([a-z_0-9]+)\"", sources))
    assert len(reasons) > 35
    assert {reason for reason in reasons - {"javascript", "policy"} if f"`{reason}`" not in page} == set()
