"""Every byte of what two ranks have saved counts: `checkpoint verify`, a resume and the command find any flip."""

import random
from pathlib import Path

import pytest
from typer.testing import CliRunner

from llmtrain.checkpoint.manager import CheckpointManager, Reports
from llmtrain.cli.checkpoint import app
from llmtrain.config.schema import CheckpointConfig
from llmtrain.errors import CheckpointError
from llmtrain.runs.audit import iter_events
from tests.support.command import llmtrain

FLIPS = 200
OVERRIDES = (
    "train.steps=4", "checkpoint.every_steps=2", "evaluate.every_steps=0", "data.valid=[]", "optim.warmup_steps=0",
    "engine.name=megatron", "engine.zero_stage=1",
)  # fmt: skip
FILES = [
    "config.yaml", "manifest.json", "manifest.json.sha256", "rank-00000.safetensors", "rank-00001.safetensors",
    "state.json",
]  # fmt: skip


def flip(file: Path, draw: random.Random) -> bytes:
    """Change one bit; returns what was there."""
    content = file.read_bytes()
    damaged = bytearray(content)
    damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
    file.write_bytes(damaged)
    return content


def assert_verify_finds(path: Path) -> None:
    error = CliRunner().invoke(app, ["verify", str(path)]).exception
    assert isinstance(error, CheckpointError)
    assert error.exit_code == 3
    assert str(path) in str(error)


def assert_resume_goes_back(checkpoints: Path, newest: Path) -> None:
    """The damaged one is named, recorded and set aside, and the older one taken. Puts it back."""
    warnings: list[str] = []
    events: list[dict[str, object]] = []
    reports = Reports(warnings.append, lambda event, **facts: events.append({"event": event, **facts}))
    reader = CheckpointManager(checkpoints, CheckpointConfig(), "", {}, reports).newest_valid()
    assert reader is not None
    assert reader.step == 2
    assert str(newest) in warnings[0]
    aside = newest.with_name(f"damaged-{newest.name}")
    assert [(event["event"], event["step"], event["folder"]) for event in events] == [("set_aside", 4, aside.name)]
    aside.rename(newest)


@pytest.mark.whole_grid
def test_two_hundred_flips_are_two_hundred_findings(workspace: Path) -> None:
    done = llmtrain("train", "run.yaml", *OVERRIDES, folder=workspace)
    assert done.returncode == 0, done.stderr
    run = workspace / "runs" / "tiny"
    checkpoints, newest = run / "checkpoints", run / "checkpoints" / "step-00000004"
    assert sorted(file.name for file in newest.iterdir()) == FILES
    draw = random.Random(7)
    for turn in range(FLIPS):
        file = newest / FILES[turn % len(FILES)]
        content = flip(file, draw)
        assert_verify_finds(newest)
        assert_resume_goes_back(checkpoints, newest)
        file.write_bytes(content)
    assert CliRunner().invoke(app, ["verify", str(newest)]).exit_code == 0

    flip(newest / "rank-00001.safetensors", draw)
    named = llmtrain("train", "run.yaml", *OVERRIDES, f"checkpoint.resume={newest}", folder=workspace)
    assert named.returncode == 3, named.stderr
    assert "rank-00001.safetensors: sha256 is" in named.stderr
    assert newest.exists()
    again = llmtrain("train", "run.yaml", *OVERRIDES, folder=workspace)
    assert again.returncode == 0, again.stderr
    assert "rank-00001.safetensors: sha256 is" in again.stderr
    assert sorted(entry.name for entry in checkpoints.iterdir()) == [
        "damaged-step-00000004",
        "step-00000002",
        "step-00000004",
    ]
    assert [(event["step"], event["reason"]) for event in iter_events(run, "set_aside")] == [(4, "damaged")]


def test_a_reader_that_hashes_nothing_is_caught(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the hashes, flips in the tensors' data go unseen: the check above is not satisfied by less."""
    assert llmtrain("train", "run.yaml", *OVERRIDES, folder=workspace).returncode == 0
    newest = workspace / "runs" / "tiny" / "checkpoints" / "step-00000004"
    monkeypatch.setattr("llmtrain.checkpoint.reader._hash_problems", lambda *_: [])
    flip(newest / "rank-00001.safetensors", random.Random(3))
    with pytest.raises(AssertionError):
        assert_verify_finds(newest)
