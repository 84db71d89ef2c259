"""What a run continues from, and what its speed is compared with."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from llmtrain.config.reading.load import load_config
from llmtrain.errors import CheckpointError, ConfigError
from llmtrain.preflight.resolve import resolve
from llmtrain.runs.folder import RunFolder
from llmtrain.train.recording import peak_of_run
from llmtrain.train.start import Start, find_start
from tests.support.run_files import write_good_run
from tests.unit.train.saved_run import save_of_run


@pytest.fixture(autouse=True)
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Two runs: the one that is started, with steps 10 and 20, and another with step 7."""
    monkeypatch.chdir(tmp_path)
    write_good_run(tmp_path)
    for run, step in (("small", 10), ("small", 20), ("other", 7)):
        save_of_run(step, name=run)
    return tmp_path


def start(resume: str, name: str = "small") -> Start:
    config = load_config(Path("run.yaml"), [f"checkpoint.resume={resume}", f"name={name}"]).config
    with RunFolder(Path("runs") / name) as folder:
        return find_start(resolve(config), folder)


@pytest.mark.parametrize("resume", ["auto", "runs/small", "runs/small/checkpoints", "runs/other", "runs/../runs/small"])
def test_a_run_with_checkpoints_continues_its_newest(resume: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = start(resume)
    assert found.checkpoint is not None and found.checkpoint.step == 20
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("resume", ["runs/other", "runs/other/checkpoints", "runs/other/checkpoints/step-00000007"])
def test_a_fresh_run_begins_with_another_ones_newest(resume: str) -> None:
    found = start(resume, name="fresh")
    assert found.checkpoint is not None and found.checkpoint.step == 7


def test_the_newest_on_the_disk_counts_whatever_the_run_says_of_itself(workspace: Path) -> None:
    """A crash between the checkpoint and the word of it: status, metrics and marks of other programs lag behind."""
    run = workspace / "runs/small"
    with RunFolder(run) as folder:
        folder.write_status("failed", 3, 10, "killed")
    (run / "metrics.jsonl").write_text('{"step": 3, "loss": 1.0}\n')
    (run / "checkpoints/latest").write_text("step-00000010")
    (run / "checkpoints/latest_checkpointed_iteration.txt").write_text("")
    found = start("auto")
    assert found.step == 20
    save_of_run(30)
    assert start("auto").step == 30


@pytest.mark.parametrize("name", ["small", "fresh"])
def test_a_damaged_checkpoint_named_by_its_path_is_never_passed_over(name: str, workspace: Path) -> None:
    named = workspace / "runs/small/checkpoints/step-00000020"
    tensors = named / "rank-00000.safetensors"
    content = tensors.read_bytes()
    tensors.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    before = sorted(named.parent.iterdir())
    with pytest.raises(CheckpointError, match=rf"(?s){tensors.name}.*sha256") as error:
        start("runs/small/checkpoints/step-00000020", name=name)
    assert error.value.exit_code == 3
    assert sorted(named.parent.iterdir()) == before
    assert start("auto").step == 10


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
