"""A rank that is slower than the others is named, with where it spends its time; no rank is without a reason."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from llmtrain.runs.audit import iter_events
from tests.architecture.source_tree import ROOT
from tests.distributed.test_local_launcher import last_row, rank_processes
from tests.support.command import ENVIRONMENT, TIMEOUT_SECONDS, start_llmtrain, wait_until

DATA_PARALLEL = ("launch.num_workers=2",)
FOUR_RANKS = ("launch.num_workers=4",)
TENSOR = ("engine.name=megatron", "parallel.tensor=2")
PIPELINE = ("engine.name=megatron", "parallel.pipeline=2", "model.num_layers=3")
ZERO = ("engine.name=deepspeed", "engine.zero_stage=2")
# A stage's only rank is compared with its own first steps.
FIRST_SLOW_STEP = {DATA_PARALLEL: 1, FOUR_RANKS: 1, TENSOR: 1, PIPELINE: 13, ZERO: 1}
STEPS_TO_NAME = 20
PLACES = {"forward": ("step", "slow_forward (slow_command.py:"), "data": ("data", "slow_preparation (slow_command.py:")}

LOOK = "observe.straggler_score=0.7"

whole_grid = pytest.mark.whole_grid


def run_slow(workspace: Path, where: str, layout: tuple[str, ...], seconds: float, steps: int, *more: str) -> str:
    """Run with a last rank that is slow, to the end; returns what was printed."""
    slow = [where, str(FIRST_SLOW_STEP[layout]), str(seconds)]
    run = ["train", "run.yaml", f"train.steps={steps}", "checkpoint.every_steps=0", LOOK, *layout, *more]
    done = subprocess.run(
        [sys.executable, "-m", "tests.distributed.slow_command", *slow, *run],
        cwd=workspace,
        env={**ENVIRONMENT, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def named(workspace: Path) -> list[dict[str, Any]]:
    return list(iter_events(workspace / "runs" / "tiny", "straggler"))


@pytest.mark.parametrize(
    ("where", "layout"),
    [
        ("forward", PIPELINE),
        pytest.param("data", DATA_PARALLEL, marks=whole_grid),
        pytest.param("forward", DATA_PARALLEL, marks=whole_grid),
        pytest.param("forward", FOUR_RANKS, marks=whole_grid),
        pytest.param("data", FOUR_RANKS, marks=whole_grid),
        pytest.param("forward", TENSOR, marks=whole_grid),
        pytest.param("data", TENSOR, marks=whole_grid),
        pytest.param("data", PIPELINE, marks=whole_grid),
        pytest.param("forward", ZERO, marks=whole_grid),
        pytest.param("data", ZERO, marks=whole_grid),
    ],
)
def test_a_rank_that_sleeps_is_named(workspace: Path, where: str, layout: tuple[str, ...]) -> None:
    first = FIRST_SLOW_STEP[layout]
    said = run_slow(workspace, where, layout, 0.3, first + STEPS_TO_NAME)
    (event,) = named(workspace)
    rank = 3 if layout == FOUR_RANKS else 1
    section, place = PLACES[where]
    assert (event["rank"], event["section"]) == (rank, section)
    assert event["place"].startswith(place)
    assert event["score"] <= 0.7
    assert first < event["step"] <= first + STEPS_TO_NAME
    assert f"slow: rank {rank} on " in said


@whole_grid
def test_without_the_waiting_nobody_could_be_named(workspace: Path) -> None:
    run_slow(workspace, "forward-unmeasured", DATA_PARALLEL, 0.15, 1 + STEPS_TO_NAME)
    assert named(workspace) == []


@whole_grid
def test_nobody_looks_unless_told_to(workspace: Path) -> None:
    run_slow(workspace, "forward", DATA_PARALLEL, 0.1, 1 + STEPS_TO_NAME, "observe.straggler_score=0.0")
    assert named(workspace) == []


def test_a_throttled_rank_is_named(workspace: Path) -> None:
    """Stopped most of the time, a fraction of a second at once, as a limit on its processor time does it."""
    process = start_llmtrain(
        "train", "run.yaml", "train.steps=100000", "checkpoint.every_steps=0", LOOK, folder=workspace
    )
    run = workspace / "runs" / "tiny"
    wait_until(lambda: last_row(run) >= 3, process)
    rank = rank_processes(run)[1]

    def throttle() -> bool:
        os.kill(rank, signal.SIGSTOP)
        time.sleep(0.15)
        os.kill(rank, signal.SIGCONT)
        time.sleep(0.03)
        return bool(named(workspace))

    wait_until(throttle, process)
    process.kill()
    process.wait()
    assert [event["rank"] for event in named(workspace)] == [1]


@whole_grid
@pytest.mark.parametrize("layout", [DATA_PARALLEL, PIPELINE])
def test_no_rank_is_named_without_a_reason(workspace: Path, layout: tuple[str, ...]) -> None:
    run_slow(workspace, "nowhere", layout, 0.0, 500, "evaluate.every_steps=0")
    assert named(workspace) == []
