"""Files of tasks are checked whole, and every fault names its key and its line."""

from pathlib import Path

import pytest

from llmtrain.config.reading.tasks import load_tasks
from llmtrain.config.tasks.template import Template
from llmtrain.errors import ConfigError


def faults_of(folder: Path, text: str) -> list[str]:
    path = folder / "tasks.yaml"
    path.write_text(text, "utf-8")
    with pytest.raises(ConfigError) as caught:
        load_tasks([path])
    return str(caught.value).splitlines()


GOOD = "{name: a, kind: choices, data: a.jsonl, prompt: '{q}', choices: ['{c}'], answer: '{a}'}"


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        ("{name: a}", "tasks.0.data (FILE:2): is required"),
        ("{name: a, data: x, kind: cloze, prompt: p}", "tasks.0.answer (FILE:2): is required with kind = cloze"),
        ("{name: a/b, data: x}", "tasks.0.name = a/b (FILE:2)"),
        ("{name: a, data: x, kind: chocies}", "Try choices"),
        (GOOD.replace("answer:", "anser:"), "unknown key. Did you mean tasks.0.answer?"),
        (GOOD.replace("{q}", "{q"), "has a single { in it"),
        (GOOD.replace("{q}", "{}"), "names no field"),
        (
            GOOD.replace("data:", "max_tokens: 3, data:"),
            "tasks.0.max_tokens = 3 (FILE:2): has no effect with kind = choices",
        ),
        (GOOD.replace("data:", "examples: 3, data:"), "tasks.0.examples_data"),
        (GOOD.replace("data:", "description: 'a {b}', data:"), "stands before all samples"),
        ("{name: a, data: x, kind: perplexity}", "tasks.0.prompt (FILE:2): is required"),
    ],
)
def test_a_fault_names_its_key_and_line(tmp_path: Path, task: str, expected: str):
    found = "\n".join(faults_of(tmp_path, f"tasks:\n  - {task}\n")).replace(str(tmp_path / "tasks.yaml"), "FILE")
    assert expected in found


def test_names_differ_in_all_files(tmp_path: Path):
    paths = [tmp_path / name for name in ("one.yaml", "two.yaml")]
    for path in paths:
        path.write_text(f"tasks:\n  - {GOOD}\n", "utf-8")
    with pytest.raises(ConfigError, match=r"two\.yaml:2\): is the name of a task at .*one\.yaml:2 too"):
        load_tasks(paths)
    assert "tasks.0" in faults_of(tmp_path, f"tasks:\n  - {GOOD}\n  - {GOOD}\n")[0]
    assert "is required" in faults_of(tmp_path, "tasks: []\n")[0]


def test_a_template_takes_keys_places_and_braces():
    sample = {"a": {"b": ["x", 2]}, "yes": True}
    assert Template.of("{a.b.0}-{a.b.1} {{yes}} {yes}").text(sample) == "x-2 {yes} true"
    assert Template.of("{a.b}").texts(sample) == ["x", "2"]
    assert Template.of(" {a.b.0}").texts(sample) == [" x"]


@pytest.mark.parametrize("text", ["{a.c}", "{a.b.2}", "{a.b.x}", "{c}", "{a}", "{a.b} "])
def test_a_field_that_is_not_there_or_no_text_is_refused(text: str):
    with pytest.raises(ValueError, match=r"has "):
        Template.of(text).texts({"a": {"b": ["x"]}})
