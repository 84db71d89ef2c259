"""`llmtrain drill`: every fault that it injects is survived as it must be, on one rank and on two."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from llmtrain.checks.drill.faults import FAULTS
from tests.distributed.conftest import workspace as workspace
from tests.support.command import llmtrain

SUPERVISED = "launch.max_stalled_attempts=3"


def drill(workspace: Path, *arguments: str) -> dict[str, Any]:
    # Saves are waited for, so that it is known how many steps a fault costs: those of this run take a few milliseconds.
    waits = "checkpoint.async_save=false"
    done = llmtrain("drill", "run.yaml", SUPERVISED, waits, "--json", *arguments, folder=workspace)
    assert done.returncode == 0, done.stdout + done.stderr
    return {outcome["fault"]: outcome for outcome in map(json.loads, done.stdout.splitlines())}


def output(workspace: Path, fault: str) -> str:
    folder = re.sub("[^A-Za-z0-9]", "-", fault)
    return (workspace / "runs" / "tiny-drill" / folder / "output.txt").read_text("utf-8")


def check(outcomes: dict[str, Any], workspace: Path, num_ranks: int = 2) -> None:
    faults = [fault for fault in FAULTS if fault.least_ranks <= num_ranks]
    assert list(outcomes) == [fault.name for fault in faults]
    for fault in faults:
        outcome = outcomes[fault.name]
        assert outcome["problems"] == []
        assert outcome["detected_seconds"] is not None and outcome["back_seconds"] is not None, fault.name
        assert outcome["same_weights"] is (None if fault.expected == "given up" else fault.same_weights)
    lost = {name: outcome["steps_lost"] for name, outcome in outcomes.items()}
    # Saved after 5 and 10, struck in 13.
    assert lost["rank killed in a step"] == 2
    assert lost["newest checkpoint damaged"] == 7
    assert lost["told to stop"] == lost["disk full"] == 0
    assert lost["weights destroyed"] > 0
    assert "SIGKILL" in outcomes["rank killed in a step"]["cause"]
    assert "sha256" in output(workspace, "newest checkpoint damaged")
    assert "is stopped (SIGSTOP)" in outcomes["rank stopped (SIGSTOP)"]["cause"]
    assert "in section data after step 12" in outcomes["data loader hangs"]["cause"]
    assert "it is in hang (faults.py:" in outcomes["data loader hangs"]["cause"]
    assert "alloc" in outcomes["memory runs out on a rank"]["cause"]
    assert re.search(
        r"What would help.*\n(  .*\n)*  train\.micro_batch_size=\d", output(workspace, "memory runs out on a rank")
    )
    assert "given up: 3 attempts in a row" in output(workspace, "same step fails every time")
    assert "abandoned" not in output(workspace, "told to stop")


@pytest.mark.whole_grid
def test_two_ranks_survive(workspace: Path) -> None:
    check(drill(workspace), workspace)


@pytest.mark.whole_grid
def test_one_rank_survives(workspace: Path) -> None:
    check(drill(workspace, "launch.num_workers=1"), workspace, num_ranks=1)


@pytest.mark.whole_grid
@pytest.mark.parametrize(
    "engine",
    [
        ("engine.name=megatron", "engine.zero_stage=1"),
        ("engine.name=megatron", "parallel.pipeline=2"),
        ("engine.name=deepspeed", "engine.zero_stage=2"),
    ],
    ids="-".join,
)
def test_every_engine_survives(workspace: Path, engine: tuple[str, ...]) -> None:
    check(drill(workspace, *engine), workspace)


def test_a_fault_that_is_not_survived_is_told(workspace: Path) -> None:
    """Without supervision nobody starts the ranks again."""
    done = llmtrain("drill", "run.yaml", "--json", "--only", "killed in a step", folder=workspace)
    assert done.returncode == 1
    problems = json.loads(done.stdout)["problems"]
    assert problems[0] == "ended with [1], not [0]"
    assert "no restarting in audit.jsonl" in problems


def test_a_name_that_no_fault_has_is_refused(workspace: Path) -> None:
    done = llmtrain("drill", "run.yaml", "--only", "locusts", folder=workspace)
    assert done.returncode == 2
    assert "--only locusts: no fault has that in its name: rank killed in a step" in done.stderr


@pytest.mark.whole_grid
def test_ranks_killed_at_random_leave_no_trace(workspace: Path) -> None:
    line = ("drill", "run.yaml", SUPERVISED, "evaluate.every_steps=0", "--kills", "4", "--mean-seconds", "2", "--json")
    done = llmtrain(*line, folder=workspace)
    assert done.returncode == 0, done.stdout + done.stderr
    punished = json.loads(done.stdout)
    assert punished["problems"] == [] and punished["same_weights"]
    # The last kills may come after the end of the run; what was killed was started again.
    assert 1 <= punished["restarts"] <= punished["kills"] <= 4
    assert 0 < punished["useful_share"] < 1
