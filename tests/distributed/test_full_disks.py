"""The real command on a disk that is full: what is told before it starts, and how it trains on without a checkpoint."""

import json
import resource
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from llmtrain.checkpoint.folders import checkpoint_steps
from llmtrain.runs.audit import iter_events
from llmtrain.runs.metrics_file import read_rows
from tests.support.command import COMMAND, ENVIRONMENT, TIMEOUT_SECONDS, llmtrain, start_llmtrain, wait_until

QUICK = ("evaluate.every_steps=0", "data.valid=[]", "checkpoint.every_steps=2", "checkpoint.keep=1")
RANKS = {
    1: ("launch.num_workers=1",),
    # With ZeRO both ranks hold a part of the state.
    2: ("launch.num_workers=2", "engine.name=megatron", "engine.zero_stage=1"),
}


def small_files() -> None:
    """No file may grow beyond 64 KiB: a rank's tensors do not fit, everything else does."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))


def limited(*arguments: str, folder: Path, limit: Callable[[], None]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [COMMAND, *arguments], cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=TIMEOUT_SECONDS,
        check=False, preexec_fn=limit,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("world_size", "policy"),
    [
        (1, "stop"),
        pytest.param(2, "continue", marks=pytest.mark.whole_grid),
        pytest.param(1, "continue", marks=pytest.mark.whole_grid),
        pytest.param(2, "stop", marks=pytest.mark.whole_grid),
    ],
)
def test_no_save_works(workspace: Path, world_size: int, policy: str) -> None:
    """Training goes on or stops as it shall, but a run whose end is not saved is never done."""
    arguments = ("train", "run.yaml", "train.steps=6", f"checkpoint.on_save_error={policy}", *QUICK, *RANKS[world_size])
    done = limited(*arguments, folder=workspace, limit=small_files)
    run = workspace / "runs" / "tiny"
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert "checkpoints/writing-step-" in done.stderr
    for words in ("File too large", "Needed: ", "Free: ", "ulimit -f"):
        assert words in done.stderr
    steps = [row["step"] for row in read_rows(run / "metrics.jsonl")]
    failed = [event["step"] for event in iter_events(run, "save_failed")]
    assert list((run / "checkpoints").iterdir()) == []
    assert json.loads((run / "status.json").read_text())["status"] == "failed"
    if policy == "continue":
        assert steps == [1, 2, 3, 4, 5, 6]
        assert failed == [2, 4, 6]
    else:
        assert failed == [2]
        assert len(steps) < 6

    again = llmtrain(*arguments, folder=workspace)
    assert again.returncode == 0, again.stderr
    assert checkpoint_steps(run / "checkpoints") == [6]


@pytest.fixture
def small_disk(workspace: Path) -> Iterator[Path]:
    """A file system of 3 MiB at `small` in the workspace."""
    folder = workspace / "small"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        pytest.skip(f"needs the right to mount a file system: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_what_does_not_fit_is_told_before_the_start(workspace: Path, small_disk: Path) -> None:
    (small_disk / "hog").write_bytes(bytes(9 << 18))
    refused = llmtrain("train", "run.yaml", "output_dir=small", *QUICK, *RANKS[1], folder=workspace)
    assert refused.returncode == 2, refused.stderr
    for words in ("output_dir = small", "Needed: ", "Free: ", "12 bytes per parameter"):
        assert words in refused.stderr
    assert sorted(entry.name for entry in small_disk.iterdir()) == ["hog"]

    (small_disk / "hog").write_bytes(bytes(1 << 20))
    warned = llmtrain(
        "train",
        "run.yaml",
        "output_dir=small",
        "checkpoint.every_steps=1",
        "checkpoint.keep=9",
        "--dry-run",
        folder=workspace,
    )
    assert warned.returncode == 0, warned.stderr
    assert "warning: small/tiny/checkpoints: not all checkpoints will fit" in warned.stderr


@pytest.mark.parametrize("world_size", [pytest.param(1, marks=pytest.mark.whole_grid), 2])
def test_a_disk_that_fills_up_and_is_freed(workspace: Path, small_disk: Path, world_size: int) -> None:
    """Everything of the run lies on the full disk, its metrics, status and audit log too: it trains on all the same."""
    steps, run = 4000, small_disk / "tiny"
    overrides = ("output_dir=small", f"train.steps={steps}", *QUICK, *RANKS[world_size], "checkpoint.every_steps=5")
    process = start_llmtrain("train", "run.yaml", *overrides, folder=workspace)
    output = workspace / "output.txt"
    wait_until(lambda: len(checkpoint_steps(run / "checkpoints")) > 0, process)
    hog = small_disk / "hog"
    with hog.open("wb", buffering=0) as file:
        while True:
            try:
                file.write(bytes(4096))
            except OSError:
                break
    wait_until(lambda: output.read_text().count("is not saved (") >= 3, process)
    before = checkpoint_steps(run / "checkpoints")
    assert len(before) == 1
    rows = (run / "metrics.jsonl").read_bytes()
    assert rows.endswith(b"\n")
    hog.unlink()
    wait_until(lambda: (checkpoint_steps(run / "checkpoints") or before) > before, process)
    process.terminate()
    assert process.wait() == 75, output.read_text()[-3000:]
    assert "Traceback" not in output.read_text()
    assert read_rows(run / "metrics.jsonl")[-1]["step"] == checkpoint_steps(run / "checkpoints")[0]
    assert sorted(entry.name for entry in (run / "checkpoints").iterdir()) == [
        f"step-{checkpoint_steps(run / 'checkpoints')[0]:08d}"
    ]
