"""Runs on Ray clusters of two nodes: machines that go and come back, and a head that dies."""

import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llmtrain.runs.audit import iter_events
from llmtrain.runs.metrics_file import iter_rows, read_rows
from tests.distributed.conftest import workspace as workspace
from tests.distributed.test_local_launcher import last_row, living, losses, rank_processes, status, tensors
from tests.support.command import COMMAND, ENVIRONMENT, llmtrain, wait_until
from tests.support.ray_cluster import RayHead, ray_head
from tests.support.sample_history import recording, samples_that_count

QUICK_TO_NOTICE = {"RAY_health_check_period_ms": "1000", "RAY_health_check_failure_threshold": "8"}
"""A head that gives up a silent node after 8 seconds; Ray's own setting is 15."""


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    """Where ranks on the cluster write down the samples of each step."""
    return tmp_path / "samples"


@pytest.fixture
def head(samples: Path) -> Iterator[RayHead]:
    """A cluster whose head node has two CPUs, and that other nodes can join: Ray has none on 127.0.0.1."""
    with ray_head(num_cpus=2, is_outward=True, extra={**QUICK_TO_NOTICE, **recording(samples)}) as found:
        yield found


def start_on(head: RayHead, workspace: Path, *arguments: str) -> subprocess.Popen[str]:
    line = [COMMAND, "train", "run.yaml", "launch.backend=ray", f"launch.ray_address={head.address}", *arguments]
    environment = {**ENVIRONMENT, **head.environ}
    with (workspace / "output.txt").open("a") as output:
        return subprocess.Popen(line, cwd=workspace, env=environment, stdout=output, stderr=output, text=True)


def output_of(workspace: Path) -> str:
    return (workspace / "output.txt").read_text("utf-8")


@pytest.mark.whole_grid
def test_the_run_shrinks_with_a_lost_node_and_grows_back(head: RayHead, workspace: Path, samples: Path) -> None:
    settings = ("checkpoint.every_steps=25", "evaluate.every_steps=0", "optim.schedule=constant")
    second = head.add_node(num_cpus=2)
    run = workspace / "runs" / "tiny"
    elastic = ("launch.num_workers=4", "launch.min_workers=2", "launch.max_stalled_attempts=3")
    process = start_on(head, workspace, "train.steps=100000", *settings, *elastic)

    def sizes() -> list[int]:
        return [event["to_workers"] for event in iter_events(run, "resized")] if run.exists() else []

    wait_until(lambda: last_row(run) >= 60, process)
    assert len(rank_processes(run)) == 4
    head.end_node(second, signal.SIGKILL)
    for size in ([2], [2, 4]):
        wait_until(lambda size=size: sizes() == size, process)
        before = last_row(run)
        wait_until(lambda before=before: last_row(run) >= before + 30, process)
        if size == [2]:
            head.add_node(num_cpus=2)
    process.terminate()
    assert process.wait(timeout=100) == 75, output_of(workspace)

    steps = last_row(run)
    # In the history that counts, every sample of the stream was used once, and in its own step.
    batch = range(8)
    assert samples_that_count(samples, run) == {
        step: [(step - 1) * len(batch) + place for place in batch] for step in range(1, steps + 1)
    }
    alone = llmtrain("train", "run.yaml", "name=alone", f"train.steps={steps}", *settings, folder=workspace)
    assert alone.returncode == 0, alone.stderr
    # What a step has computed differs by roundings only.
    rows = [
        {row["step"]: row for row in read_rows(workspace / "runs" / name / "metrics.jsonl")}
        for name in ("alone", "tiny")
    ]
    assert list(rows[0]) == list(rows[1]) == list(range(1, steps + 1))
    assert [row["tokens"] for row in rows[0].values()] == [row["tokens"] for row in rows[1].values()]
    for step in (1, 20, 60, shrunk_at(run), steps):
        assert rows[1][step]["loss"] == pytest.approx(rows[0][step]["loss"], rel=1e-2)
    shrink, grow = iter_events(run, "resized")
    assert (shrink["from_workers"], grow["from_workers"]) == (4, 2)
    # Growing loses nothing: the ranks were told to save first.
    assert len(list(iter_events(run, "restarting"))) == 1
    resumed = [row["resumed_from"] for row in iter_rows(run / "metrics.jsonl") if "resumed_from" in row]
    assert resumed == [shrink["step"], grow["step"]]
    assert grow["step"] == max(row["step"] for row in rows_before(run, grow["step"] + 1))


def shrunk_at(run: Path) -> int:
    return next(iter_events(run, "resized"))["step"] + 1


def rows_before(run: Path, step: int) -> list[dict[str, Any]]:
    """The rows as they were written, up to the one that continues with that step."""
    rows = list(iter_rows(run / "metrics.jsonl"))
    end = next(number for number, row in enumerate(rows) if row["step"] == step and "resumed_from" in row)
    return rows[:end]


@pytest.mark.whole_grid
def test_a_run_that_may_not_shrink_waits_for_the_node(head: RayHead, workspace: Path) -> None:
    settings = ("train.steps=800", "checkpoint.every_steps=25")
    assert (
        llmtrain("train", "run.yaml", "name=alone", "launch.num_workers=4", *settings, folder=workspace).returncode == 0
    )
    second = head.add_node(num_cpus=2)
    run = workspace / "runs" / "tiny"
    process = start_on(head, workspace, *settings, "launch.num_workers=4", "launch.max_stalled_attempts=3")
    wait_until(lambda: last_row(run) >= 60, process)
    ranks = rank_processes(run)
    # The raylet alone: its workers notice, and the ranks end with them.
    [raylet] = second.processes("raylet")
    raylet.kill()
    wait_until(lambda: "starting again" in output_of(workspace), process)
    wait_until(lambda: "waiting for room on the cluster" in output_of(workspace), process)
    assert status(run)["status"] == "restarting"
    head.add_node(num_cpus=2)
    assert process.wait(timeout=300) == 0, output_of(workspace)
    assert living(ranks) == []
    alone = workspace / "runs" / "alone"
    assert losses(run) == losses(alone)
    assert tensors(run, 800) == tensors(alone, 800)


@pytest.mark.whole_grid
def test_a_lost_head_ends_the_command_and_a_new_one_continues(head: RayHead, workspace: Path) -> None:
    run = workspace / "runs" / "tiny"
    process = start_on(head, workspace, "train.steps=100000", "checkpoint.every_steps=20")
    wait_until(lambda: last_row(run) >= 30, process)
    ranks = rank_processes(run)
    [server] = head.nodes[0].processes("gcs_server")
    server.kill()
    assert process.wait(timeout=90) == 1, output_of(workspace)
    assert "\nerror: the head of the Ray cluster" in output_of(workspace)
    assert status(run)["status"] == "failed"
    assert living(ranks) == []
    # Its raylet ends with it, and the ranks with that.
    saved = max(int(folder.name[5:]) for folder in (run / "checkpoints").glob("step-*"))
    with ray_head(num_cpus=2) as other:
        again = start_on(other, workspace, f"train.steps={saved + 50}")
        assert again.wait(timeout=200) == 0, output_of(workspace)
    assert f"from step {saved}" in output_of(workspace)


@pytest.mark.whole_grid
def test_a_head_that_dies_while_a_run_waits_for_room_is_told(head: RayHead, workspace: Path) -> None:
    process = start_on(head, workspace, "launch.num_workers=4")
    wait_until(lambda: "waiting for room on the cluster" in output_of(workspace), process)
    [server] = head.nodes[0].processes("gcs_server")
    server.kill()
    assert process.wait(timeout=90) == 1, output_of(workspace)
    assert "\nerror: the head of the Ray cluster" in output_of(workspace)
    assert not (workspace / "runs").exists()


@pytest.mark.whole_grid
def test_the_newest_checkpoint_on_storage_counts(head: RayHead, workspace: Path) -> None:
    """Nobody is told of a checkpoint: one that is there when everything dies is the one that is continued."""
    run = workspace / "runs" / "tiny"
    process = start_on(
        head, workspace, "train.steps=100000", "checkpoint.every_steps=20", "checkpoint.async_save=false"
    )
    folders = run / "checkpoints"
    wait_until(lambda: any(folders.glob("step-*")), process)
    ranks = rank_processes(run)
    for rank in ranks:
        os.kill(rank, signal.SIGSTOP)
    newest = max(folders.glob("step-*")).name
    process.kill()
    process.wait()
    again = start_on(head, workspace, f"train.steps={int(newest[5:]) + 3}")
    assert again.wait(timeout=200) == 0, output_of(workspace)
    assert re.search(rf"from step {int(newest[5:])}\b", output_of(workspace))
