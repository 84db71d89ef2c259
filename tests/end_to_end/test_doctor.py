"""`llmtrain doctor`: what works here, and in environments that are broken for real, what would mend them."""

import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from typing import Any

import pytest

from tests.support.command import ENVIRONMENT, TIMEOUT_SECONDS, llmtrain, llmtrain_anew

ALONE = {**ENVIRONMENT, "PATH": os.environ["PATH"]}


def doctor(python: str | Path, folder: Path, *before: Path) -> tuple[int, dict[str, dict[str, Any]], str]:
    """Exit code, findings by section and name, and stderr; with another Python, `before` first on its path."""
    code = "from llmtrain.cli import main; main(['doctor', '--json'])"
    environment = {**ALONE, "PYTHONPATH": os.pathsep.join(map(str, before))}
    done = subprocess.run(
        [str(python), "-P", "-c", code], cwd=folder, env=environment, capture_output=True, text=True,
        timeout=TIMEOUT_SECONDS, check=False,
    )  # fmt: skip
    told = json.loads(done.stdout)
    assert told["can_train"] == (done.returncode == 0)
    return done.returncode, {f"{each['section']}/{each['name']}": each for each in told["findings"]}, done.stderr


def fake_package(folder: Path, name: str) -> None:
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text("raise ImportError('broken on purpose')\n")


def fake_version(folder: Path, name: str, version: str) -> None:
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def environment_without(folder: Path, name: str) -> Path:
    """The Python of a virtual environment that has everything that this one has, but for one package."""
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    (target,) = folder.glob("lib/python3*/site-packages")
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if not entry.name.startswith(name) and not (target / entry.name).exists():
            (target / entry.name).symlink_to(entry)
    return python


def test_this_machine_can_train(tmp_path: Path) -> None:
    done = llmtrain("doctor", folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Training is possible here." in done.stdout
    assert "\x1b" not in done.stdout
    lines = {line.split()[1]: line for line in done.stdout.splitlines() if line.startswith("  ok")}
    assert "fp32, bf16, fp16" in lines["torch"]
    assert "ZeRO 1; tensor, pipeline, context parallel" in lines["megatron"]
    assert "ZeRO 1, ZeRO 2, ZeRO 3, offload to cpu" in lines["deepspeed"]
    assert "two ranks met" in lines["gloo"]
    assert list(tmp_path.iterdir()) == [], "it leaves nothing behind"


@pytest.mark.whole_grid
def test_broken_missing_and_wrong_packages_are_told_with_what_mends_them(tmp_path: Path) -> None:
    python = environment_without(tmp_path / "venv", "webdataset")
    fakes = tmp_path / "fakes"
    fake_package(fakes, "wandb")
    fake_package(fakes, "deepspeed")
    fake_version(fakes, "ray", "2.10.0")
    code, found, errors = doctor(python, tmp_path, fakes)
    assert code == 0, f"none of these is needed: {errors}"
    pip = f"{python} -m pip install"
    ray, wandb, webdataset = (found[f"packages/{name}"] for name in ("ray", "wandb", "webdataset"))
    assert (webdataset["state"], webdataset["mend"]) == ("missing", f"{pip} 'webdataset>=1.0'")
    assert (ray["state"], ray["text"]) == ("broken", "2.10.0 is installed; llmtrain needs >=2.54")
    assert ray["mend"] == f"{pip} 'ray[data,default]>=2.54'"
    assert wandb["state"] == "broken"
    assert "ImportError: broken on purpose" in wandb["text"]
    assert wandb["mend"] == f"{pip} --force-reinstall 'wandb>=0.31'"
    assert found["engines/deepspeed"]["state"] == "broken" and "broken on purpose" in found["engines/deepspeed"]["text"]
    assert found["engines/megatron"]["state"] == "ok", "the others are not harmed"
    assert found["engines/torch"]["state"] == "ok"
    assert "records/wandb" not in found, "what cannot be imported is told once"


def test_without_torch_nothing_can_be_trained(tmp_path: Path) -> None:
    fake_package(tmp_path / "fakes", "torch")
    code, found, _ = doctor(sys.executable, tmp_path, tmp_path / "fakes")
    assert code == 1
    for name in ("devices/torch", "engines/torch"):
        assert found[name]["state"] == "broken" and "broken on purpose" in found[name]["text"]
    assert "pip install --force-reinstall 'torch" in found["devices/torch"]["mend"]
    assert found["engines/megatron"]["state"] == found["engines/deepspeed"]["state"] == "broken"


def test_what_is_needed_and_broken_is_told_in_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_package(tmp_path / "fakes", "torch")
    monkeypatch.setitem(ENVIRONMENT, "PYTHONPATH", str(tmp_path / "fakes"))
    done = llmtrain_anew("doctor", "--output-dir", "/proc/runs", folder=tmp_path)
    assert done.returncode == 1
    assert "/proc cannot be written" in done.stdout and "mend: write runs elsewhere" in done.stdout
    assert "Training is not possible here. Broken: output folder, torch, gloo, torch, " in done.stdout
    assert "--force-reinstall safetensors" not in done.stdout, "it is torch that is broken"
