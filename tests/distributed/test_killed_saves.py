"""The real command, killed while a checkpoint is written or an old one removed: it ends as if it never had been."""

import json
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llmtrain.checkpoint.reader import open_checkpoint
from llmtrain.values.fragment import Box
from tests.architecture.source_tree import ROOT
from tests.support.command import ENVIRONMENT, TIMEOUT_SECONDS

POINTS = 20
OVERRIDES = (
    "train.steps=6", "checkpoint.every_steps=1", "checkpoint.keep=1", "evaluate.every_steps=0", "data.valid=[]",
    "launch.max_stalled_attempts=0",
)  # fmt: skip


def kill_runs(workspace: Path, world_size: int, async_save: bool, phase: str, rank: int, points: int) -> None:
    """One kill in each of `points` equal parts of the phase, each in a run of its own."""
    draw = random.Random(f"{world_size} {async_save} {phase}")
    # With ZeRO both ranks hold a part of the state.
    engine = ["engine.name=megatron", "engine.zero_stage=1"] if world_size > 1 else []
    overrides = [
        *OVERRIDES,
        *engine,
        f"launch.num_workers={world_size}",
        f"checkpoint.async_save={str(async_save).lower()}",
    ]
    job = {
        "overrides": overrides,
        "phase": phase,
        "rank": rank,
        "places": [(point + draw.random()) / points for point in range(points)],
    }
    (workspace / "job.json").write_text(json.dumps(job))
    line = [sys.executable, "-m", "tests.distributed.mortal_runs", "job.json"]
    environment = {**ENVIRONMENT, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        line, cwd=workspace, env=environment, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False
    )
    assert done.returncode == 0, done.stderr
    results = [json.loads(row) for row in done.stdout.splitlines()]
    assert len(results) == points
    whole = workspace / "runs" / "whole"
    for result in results:
        assert result["killed"] == (-signal.SIGKILL if world_size == 1 else 1), result
        assert result["continued"] == 0, (result, (workspace / "output.txt").read_text()[-2000:])
        assert_same_run(whole, workspace / "runs" / result["name"])
    if phase == "write":
        assert any(name.startswith("writing-") for result in results for name in result["left"])
    else:
        assert any(name.startswith("removing-") for result in results for name in result["left"])


def assert_same_run(whole: Path, killed: Path) -> None:
    """The same files and nothing else, and in the last checkpoint the same bits."""
    files, others = ({entry.name for entry in run.iterdir()} for run in (whole, killed))
    assert files == others - OF_A_DEATH
    assert [entry.name for entry in (killed / "checkpoints").iterdir()] == ["step-00000006"]
    first, second = (open_checkpoint(run / "checkpoints" / "step-00000006") for run in (whole, killed))
    assert first.state == second.state
    for info in first.tensors():
        box = Box.whole(info.shape)
        assert torch.equal(first.read(info.name, info.kind, box), second.read(info.name, info.kind, box)), info.name


OF_A_DEATH = {".run.lock.takeover"}
"""What stays in a run folder once an attempt has died: the file whose lock guards takeovers."""

CASES = [
    (world_size, async_save, phase, world_size - 1 if phase == "write" else 0)
    for world_size in (1, 2)
    for async_save in (True, False)
    for phase in ("write", "remove")
]


@pytest.mark.parametrize(("world_size", "async_save", "phase", "rank"), [CASES[4], CASES[7]])
def test_a_killed_save_is_as_if_it_had_never_been(
    workspace: Path, world_size: int, async_save: bool, phase: str, rank: int
) -> None:
    kill_runs(workspace, world_size, async_save, phase, rank, points=3)


@pytest.mark.whole_grid
@pytest.mark.parametrize(("world_size", "async_save", "phase", "rank"), CASES)
def test_twenty_killed_saves(workspace: Path, world_size: int, async_save: bool, phase: str, rank: int) -> None:
    kill_runs(workspace, world_size, async_save, phase, rank, points=POINTS)
