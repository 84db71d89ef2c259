"""Ranks on Ray: the same bits as on this machine alone, and what follows when a part of it dies.

Every command starts a Ray of its own. Where a fault is injected, the run ends as if nothing had happened.
"""

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from launch.on_ray.host import RankHost
from llmtrain.runs.audit import iter_events
from tests.distributed.conftest import workspace as workspace
from tests.distributed.test_local_launcher import last_row, living, losses, rank_processes, status, tensors
from tests.support.command import llmtrain, start_llmtrain, wait_until

ON_RAY = ("launch.backend=ray", "launch.max_stalled_attempts=3")
STEPS = 160
LAYOUTS = {
    "dp2": (),
    "tp2": ("engine.name=megatron", "parallel.tensor=2"),
    "pp2": ("engine.name=megatron", "parallel.pipeline=2"),
}


def train_arguments(name: str, *more: str) -> tuple[str, ...]:
    return ("train", "run.yaml", f"name={name}", f"train.steps={STEPS}", "checkpoint.every_steps=20", *more)


@pytest.fixture
def undisturbed(workspace: Path) -> Path:
    """The run on this machine alone, to the end."""
    done = llmtrain(*train_arguments("undisturbed"), folder=workspace)
    assert done.returncode == 0, done.stderr
    return workspace / "runs" / "undisturbed"


def parents(process: int, depth: int) -> psutil.Process:
    """The parent of a process's parent, and so on."""
    found = psutil.Process(process)
    for _ in range(depth):
        parent = found.parent()
        assert parent
        found = parent
    return found


def agent_of(rank: int) -> psutil.Process:
    found = parents(rank, 1)
    assert "launch.forking.agent" in found.cmdline()
    return found


def worker_of(rank: int) -> psutil.Process:
    found = parents(rank, 2)
    assert RankHost.__name__ in " ".join(found.cmdline())
    return found


@pytest.mark.parametrize(
    "layout", ["tp2", *(pytest.param(name, marks=pytest.mark.whole_grid) for name in ("dp2", "pp2"))]
)
def test_ray_gives_the_same_bits(workspace: Path, layout: str) -> None:
    for name, backend in (("local", "local"), ("ray", "ray")):
        line = ("train", "run.yaml", f"name={name}", f"launch.backend={backend}", *LAYOUTS[layout])
        done = llmtrain(*line, folder=workspace)
        assert done.returncode == 0, done.stderr
        assert "done at step 20/20" in done.stderr
    local, other = workspace / "runs" / "local", workspace / "runs" / "ray"
    assert len(losses(local)) == 20
    assert losses(local) == losses(other)
    assert tensors(local, 20) == tensors(other, 20)
    logs = sorted(path.name for path in (other / "logs").iterdir())
    assert logs == ["rank-00000.log", "rank-00001.log"]


def kill_rank(ranks: list[int]) -> None:
    os.kill(ranks[1], signal.SIGKILL)


def kill_agent(ranks: list[int]) -> None:
    agent_of(ranks[1]).kill()


def kill_worker(ranks: list[int]) -> None:
    worker_of(ranks[0]).kill()


def stop_rank(ranks: list[int]) -> None:
    os.kill(ranks[1], signal.SIGSTOP)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        pytest.param(kill_rank, "rank 1 on .*: was killed by SIGKILL", marks=pytest.mark.whole_grid),
        pytest.param(
            kill_agent,
            "rank 1 on .*: the process that forked it on its worker has died",
            marks=pytest.mark.whole_grid,
        ),
        (kill_worker, "rank 0 on .*: its worker on the cluster has died"),
        pytest.param(
            stop_rank,
            r"rank 1 on .*: no progress in section \w+ .*: its process is stopped \(SIGSTOP\)",
            marks=pytest.mark.whole_grid,
        ),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_the_run_survives(workspace: Path, undisturbed: Path, fault: Callable[[list[int]], None], said: str) -> None:
    watchdog = [f"launch.watchdog.{section}_seconds=3" for section in ("step", "data", "evaluate", "checkpoint")]
    process = start_llmtrain(*train_arguments("struck", *ON_RAY, *watchdog), folder=workspace)
    run = workspace / "runs" / "struck"
    wait_until(lambda: last_row(run) >= 30, process)
    before = rank_processes(run)
    fault(before)
    assert process.wait(timeout=200) == 0
    output = (workspace / "output.txt").read_text("utf-8")
    assert re.search(f"error: {said}", output)
    assert "starting again (attempt 2), from the checkpoint of step" in output
    assert living(before) == []
    assert losses(run) == losses(undisturbed)
    assert tensors(run, STEPS) == tensors(undisturbed, STEPS)
    assert len(list(iter_events(run, "restarting"))) == 1


def wait_for_the_end_of(processes: list[int], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while living(processes) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert living(processes) == []


@pytest.fixture
def long_run(workspace: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A run on Ray that would go on for long, some steps after its start."""
    line = ("train", "run.yaml", "train.steps=100000", "checkpoint.every_steps=20", *ON_RAY)
    process = start_llmtrain(*line, folder=workspace)
    run = workspace / "runs" / "tiny"
    wait_until(lambda: last_row(run) >= 30, process)
    yield process, run
    process.kill()
    process.wait()


@pytest.mark.whole_grid
def test_everything_dies_with_the_command(long_run: tuple[subprocess.Popen[str], Path]) -> None:
    process, run = long_run
    everything = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
    ranks = rank_processes(run)
    assert set(ranks) <= set(everything)
    process.kill()
    process.wait()
    wait_for_the_end_of(ranks, seconds=10)
    wait_for_the_end_of(everything, seconds=100)  # Ray's agents look for their head before they give up


@pytest.mark.whole_grid
def test_told_to_stop_it_saves_and_continues(long_run: tuple[subprocess.Popen[str], Path], workspace: Path) -> None:
    process, run = long_run
    process.terminate()
    assert process.wait(timeout=100) == 75
    step = last_row(run)
    assert (status(run)["status"], status(run)["step"]) == ("preempted", step)
    line = ("train", "run.yaml", f"train.steps={step + 5}", *ON_RAY)
    again = llmtrain(*line, folder=workspace)
    assert again.returncode == 0, again.stderr
    assert f"from step {step}" in again.stderr
    assert last_row(run) == step + 5
