"""A package that breaks transformers is named, by the commands and by the doctor."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llmtrain.checks.doctor import examination
from llmtrain.checks.doctor.examination import ask
from llmtrain.checks.doctor.findings import Finding
from tests.support.hf_folders import write_gpt2

BROKEN = """import torch
def register():
    torch.library.register_fake("torchvision::nms")(lambda boxes: boxes)
register()
"""
"""As torchvision fails beside a PyTorch that it was not built for: inside of PyTorch."""


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for PYTHONPATH with a torchvision that cannot be imported."""
    place = tmp_path / "packages"
    (place / "torchvision").mkdir(parents=True)
    (place / "torchvision" / "__init__.py").write_text(BROKEN)
    about = place / "torchvision-0.99.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: torchvision\nVersion: 0.99.0\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(place), os.environ.get("PYTHONPATH", ""))))
    return place


def test_commands_name_the_package(broken: Path, tmp_path: Path) -> None:
    hf = write_gpt2(tmp_path / "hf")
    for arguments in (("generate", hf, "--prompt", "a"), ("import", hf, tmp_path / "run")):
        command = [sys.executable, "-c", "from llmtrain.cli import main; main()", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 1 and done.stdout == ""
        assert "torchvision 0.99.0" in done.stderr and "pip uninstall torchvision" in done.stderr
        assert "Traceback" not in done.stderr


def test_the_doctor_names_it_too(broken: Path) -> None:
    module = examination.IMPORTED["transformers"]
    answer = ask("imports", module)
    assert answer[f"{module} breaks in"] == "torchvision"
    ok = Finding("packages", "transformers", "ok", "transformers 5")
    finding = examination.with_import_error(ok, {"transformers": answer[module]}, answer)
    assert finding.state == "broken" and "torchvision" in finding.text and "uninstall torchvision" in finding.mend


def test_a_folder_is_read_without_what_takes_seconds_to_import(tmp_path: Path) -> None:
    code = (
        "import sys, torch; from pathlib import Path; from llmtrain.infer.model import load_model\n"
        "load_model(Path(sys.argv[1]), torch.device('cpu'))\n"
        "assert not {'torch._dynamo', 'transformers.modeling_utils'} & sys.modules.keys()"
    )
    command = [sys.executable, "-c", code, str(write_gpt2(tmp_path / "hf"))]
    assert subprocess.run(command, timeout=300).returncode == 0
