"""What a run continues from, and what its speed is compared with."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from llmtrain.config.load import load_config
from llmtrain.errors import ConfigError
from llmtrain.train.run_folder import RunFolder
from llmtrain.train.setup import Start, find_start, peak_of_run
from tests.support.run_files import write_good_run
from tests.unit.checkpoint.saved import save


@pytest.fixture(autouse=True)
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Two runs: the one that is started, with steps 10 and 20, and another with step 7."""
    monkeypatch.chdir(tmp_path)
    write_good_run(tmp_path)
    for run, step in (("small", 10), ("small", 20), ("other", 7)):
        save(tmp_path / "runs" / run / "checkpoints", step)
    return tmp_path


def start(resume: str, name: str = "small") -> Start:
    config = load_config(Path("run.yaml"), [f"checkpoint.resume={resume}", f"name={name}"]).config
    with RunFolder(Path("runs") / name) as folder:
        return find_start(config, folder)


@pytest.mark.parametrize("resume", ["auto", "runs/small", "runs/small/checkpoints", "runs/other", "runs/../runs/small"])
def test_a_run_with_checkpoints_continues_its_newest(resume: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = start(resume)
    assert found.checkpoint is not None and found.checkpoint.step == 20
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("resume", ["runs/other", "runs/other/checkpoints", "runs/other/checkpoints/step-00000007"])
def test_a_fresh_run_begins_with_another_ones_newest(resume: str) -> None:
    found = start(resume, name="fresh")
    assert found.checkpoint is not None and found.checkpoint.step == 7


def test_going_back_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    found = start("runs/small/checkpoints/step-00000010")
    assert found.checkpoint is not None and found.checkpoint.step == 10
    assert "going back to step" in capsys.readouterr().err
    found = start("runs/small/checkpoints/step-00000020")
    assert capsys.readouterr().err == ""


def test_neither_a_checkpoint_nor_a_run(workspace: Path) -> None:
    with pytest.raises(ConfigError, match=r"neither a checkpoint.*Try runs/other\."):
        start("runs", name="fresh")


@pytest.mark.parametrize(
    ("precision", "device", "peak"),
    [("bf16", "cuda", 2 * 989e12), ("fp16", "cuda", 2 * 989e12), ("fp32", "cuda", None), ("bf16", "cpu", None)],
)
def test_utilization_is_told_where_a_peak_is_known(
    monkeypatch: pytest.MonkeyPatch, precision: str, device: str, peak: float | None
) -> None:
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    config = load_config(Path("run.yaml"), [f"train.precision={precision}", "launch.num_workers=2"]).config
    assert peak_of_run(config, torch.device(device)) == peak
