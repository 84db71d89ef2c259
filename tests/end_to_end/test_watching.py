"""Watching a real run: status and logs while it is killed, restarted and stopped, and its effective training time."""

import json
import os
import re
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from llmtrain.files import sealed, unsealed
from llmtrain.report.efficiency import run_efficiency
from llmtrain.runs.metrics_file import iter_rows, read_rows
from tests.distributed.conftest import workspace as workspace
from tests.support.command import COMMAND, ENVIRONMENT, TIMEOUT_SECONDS, llmtrain, start_llmtrain, wait_until

SUPERVISED = "launch.max_stalled_attempts=3"
LONG = ("train.steps=100000", "evaluate.every_steps=0", SUPERVISED)


def status(workspace: Path, *arguments: str) -> dict[str, Any]:
    done = llmtrain("status", "runs/tiny", "--json", *arguments, folder=workspace)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def last_row(run: Path) -> int:
    metrics = run / "metrics.jsonl"
    complete = metrics.read_text("utf-8").rpartition("\n")[0] if metrics.exists() else ""
    return json.loads(complete.rpartition("\n")[2])["step"] if complete else 0


def rank_process(run: Path, rank: int) -> int:
    text = (run / "logs" / f"rank-{rank:05d}.log").read_text("utf-8")
    return int(re.findall(r"^=== .* process (\d+)$", text, re.MULTILINE)[-1])


def attempts_begun(run: Path) -> int:
    audit = run / "audit.jsonl"
    return audit.read_text("utf-8").count('"started"') if audit.exists() else 0


def test_a_run_is_watched_through_its_troubles(workspace: Path) -> None:
    """A rank is killed; the run goes on, is told to stop, starts again, and its launcher is killed with all ranks."""
    run = workspace / "runs" / "tiny"
    train = start_llmtrain("train", "run.yaml", *LONG, folder=workspace)
    wait_until(lambda: last_row(run) > 13, train)
    with (workspace / "followed.txt").open("w") as output:
        follower = subprocess.Popen(
            [COMMAND, "logs", "-f", "-n", "1", run], cwd=workspace, env=ENVIRONMENT, stdout=output, stderr=output
        )
    try:
        wait_until(lambda: " 1 | " in (workspace / "followed.txt").read_text("utf-8"), train)
        os.kill(rank_process(run, 1), signal.SIGKILL)
        wait_until(lambda: attempts_begun(run) == 2 and "training" in (run / "status.json").read_text("utf-8"), train)
        ranks = [rank_process(run, rank) for rank in (0, 1)]
        view = status(workspace)
        assert (view["state"], view["alive"], view["attempt"]) == ("running", True, 2)
        assert view["total_steps"] == 100_000 and view["checkpoint_step"] % 10 == 0

        train.send_signal(signal.SIGTERM)
        assert train.wait(TIMEOUT_SECONDS) == 75
        view = status(workspace)
        assert (view["state"], view["alive"]) == ("preempted", None)
        assert view["checkpoint_step"] == view["step"], "it was saved at the very step"

        train = start_llmtrain("train", "run.yaml", *LONG, folder=workspace)
        wait_until(lambda: last_row(run) > view["step"] + 3, train)
        ranks += [rank_process(run, rank) for rank in (0, 1)]
        train.kill()
        train.wait()
        # The ranks die with their launcher, and nobody is left to say so.
        assert follower.wait(TIMEOUT_SECONDS) == 0
    finally:
        follower.kill()
        train.kill()
    view = status(workspace)
    assert (view["state"], view["alive"], view["attempt"]) == ("dead", False, 3)
    assert "is gone, though the run was running" in view["message"]
    assert view["next_action"].endswith(f"it continues from step {view['checkpoint_step']}")
    followed = (workspace / "followed.txt").read_text("utf-8")
    # The second and the third attempt of both.
    for number, process in enumerate(ranks):
        assert re.search(rf"^ {number % 2} \| === .* process {process}$", followed, re.MULTILINE)
    assert "told to stop; waiting for its next start" in followed
    assert followed.splitlines()[-1].startswith(f"{run}: dead")


@pytest.mark.whole_grid
def test_effective_training_time_of_a_run_that_was_killed(workspace: Path) -> None:
    run = workspace / "runs" / "tiny"
    config = ("train.steps=60", SUPERVISED)
    train = start_llmtrain("train", "run.yaml", *config, folder=workspace)
    wait_until(lambda: last_row(run) > 12, train)
    os.kill(rank_process(run, 0), signal.SIGKILL)
    assert train.wait(TIMEOUT_SECONDS) == 0
    spent = run_efficiency(run)
    every, counted = ([row for row in read(run / "metrics.jsonl") if "loss" in row] for read in (iter_rows, read_rows))
    assert (spent.starts, spent.restarts) == (2, 1)
    assert len(counted) == 60
    # A step may have been finished whose row was not written any more.
    assert 0 <= spent.lost_steps - (len(every) - 60) <= 1
    assert spent.step_seconds == pytest.approx(sum(row["step_seconds"] for row in counted))
    assert spent.lost_seconds == pytest.approx(sum(row["step_seconds"] for row in every) - spent.step_seconds)
    parts = spent.step_seconds + spent.lost_seconds + spent.evaluate_seconds + spent.checkpoint_seconds
    assert parts + spent.down_seconds <= spent.wall_seconds * 1.001, "no second is counted twice"
    assert spent.ratio is not None and 0 < spent.ratio < 1
    output = (workspace / "output.txt").read_text("utf-8")
    assert f"effective training time {spent.ratio:.1%} of 0:00:" in output
    assert f": 1 restart, {spent.lost_steps} lost step" in output
    assert "done at step 60/60" in output

    done = llmtrain("report", "runs/tiny", folder=workspace)
    assert done.returncode == 0
    page = (run / "report.html").read_text("utf-8")
    assert "was killed by SIGKILL. Started again after step" in page
    assert f"<dd>{spent.ratio:.1%}<small>" in page


def test_a_run_that_is_given_up_ends_with_what_it_has_cost(workspace: Path) -> None:
    run = workspace / "runs" / "tiny"
    config = (
        "train.steps=100000",
        "launch.max_stalled_attempts=1",
        "checkpoint.every_steps=0",
        "evaluate.every_steps=0",
    )
    train = start_llmtrain("train", "run.yaml", *config, folder=workspace)
    wait_until(lambda: last_row(run) > 3, train)
    os.kill(rank_process(run, 1), signal.SIGKILL)
    assert train.wait(TIMEOUT_SECONDS) == 93
    output = (workspace / "output.txt").read_text("utf-8")
    assert "given up: an attempt ended without a newer checkpoint" in output
    assert output.splitlines()[-1].startswith("effective training time ")
    view = status(workspace)
    assert view["state"] == "stalled" and "SIGKILL" in view["cause"]


@pytest.mark.whole_grid
def test_an_interrupted_follower_is_quiet(workspace: Path) -> None:
    run = workspace / "runs" / "tiny"
    assert llmtrain("train", "run.yaml", folder=workspace).returncode == 0
    state = json.loads((run / "status.json").read_text("utf-8"))
    (run / "status.json").write_text(json.dumps(sealed({**unsealed(state), "status": "preempted"})))
    follower = subprocess.Popen(
        [COMMAND, "logs", "-f", run],
        cwd=workspace,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert follower.stdout is not None and follower.stdout.readline().startswith(" 0 | === ")
    assert follower.stderr is not None and "waiting for its next start" in follower.stderr.readline()
    follower.send_signal(signal.SIGINT)
    rest = follower.communicate(timeout=TIMEOUT_SECONDS)[1]
    assert follower.returncode == 143 and rest == "interrupted\n"
