"""`llmtrain data run` is killed at random moments, its workers too: the result is that of an undisturbed run."""

import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.architecture.source_tree import ROOT
from tests.support.blocked_command import BLOCKED
from tests.support.collections import run_quietly, tree_hash, write_collection, write_pipeline
from tests.support.command import ENVIRONMENT, llmtrain, start_llmtrain, wait_until


def workers_of(pid: int) -> list[psutil.Process]:
    """What a command has started, as far as it does work: helpers of Python do none."""
    found = []
    for child in psutil.Process(pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # one that is just ending
            if "resource_tracker" not in " ".join(child.cmdline()):
                found.append(child)
    return found


@pytest.mark.parametrize("kills", [3, pytest.param(10, marks=pytest.mark.whole_grid)])
def test_killed_at_random_moments_the_result_is_the_same(tmp_path: Path, kills: int) -> None:
    write_collection(tmp_path, 60)
    whole = write_pipeline(tmp_path, output_dir=str(tmp_path / "whole"))
    expected = tree_hash(run_quietly(whole))
    total = len(list((tmp_path / "whole" / "corpus" / "done").iterdir()))
    write_pipeline(tmp_path)
    done = tmp_path / "out" / "corpus" / "done"
    draw = random.Random(kills)
    # Moments all over the run, and none that a kill before has made sure of already.
    moments = sorted(draw.randrange(total) for _ in range(kills))
    for moment in moments:
        command = start_llmtrain("data", "run", "pipeline.yaml", "run.workers=2", folder=tmp_path)
        wait_until(lambda wanted=moment: done.is_dir() and len(list(done.iterdir())) >= wanted, command)
        time.sleep(draw.uniform(0, 0.1))
        children = workers_of(command.pid) if command.poll() is None else []
        command.send_signal(signal.SIGKILL)
        command.wait()
        psutil.wait_procs(children, timeout=60)
        assert [child for child in children if child.is_running()] == []
    ended = llmtrain("data", "run", "pipeline.yaml", "run.workers=2", folder=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert tree_hash(tmp_path / "out" / "corpus") == expected
    left = [path for path in (tmp_path / "out" / "corpus").rglob(".*") if not path.name.startswith(".run.lock")]
    assert left == [], "what killed tasks had begun is cleared"


def test_a_worker_that_is_killed_costs_its_tasks_only(tmp_path: Path) -> None:
    write_collection(tmp_path, 60)
    expected = tree_hash(run_quietly(write_pipeline(tmp_path, output_dir=str(tmp_path / "whole"))))
    write_pipeline(tmp_path)
    done = tmp_path / "out" / "corpus" / "done"
    command = start_llmtrain("data", "run", "pipeline.yaml", "run.workers=2", folder=tmp_path)
    wait_until(lambda: done.is_dir() and len(list(done.iterdir())) >= 3, command)
    victims = [
        child for child in workers_of(command.pid) if not child.children() and "forkserver" in " ".join(child.cmdline())
    ]
    os.kill(victims[-1].pid, signal.SIGKILL)
    assert command.wait(timeout=300) == 0, (tmp_path / "output.txt").read_text()
    assert tree_hash(tmp_path / "out" / "corpus") == expected


def test_told_to_stop_the_command_finishes_what_it_does_and_continues(tmp_path: Path) -> None:
    write_collection(tmp_path, 60)
    expected = tree_hash(run_quietly(write_pipeline(tmp_path, output_dir=str(tmp_path / "whole"))))
    write_pipeline(tmp_path)
    done = tmp_path / "out" / "corpus" / "done"
    command = start_llmtrain("data", "run", "pipeline.yaml", "run.workers=2", folder=tmp_path)
    wait_until(lambda: done.is_dir() and len(list(done.iterdir())) >= 3, command)
    children = workers_of(command.pid)
    command.send_signal(signal.SIGTERM)
    assert command.wait(timeout=60) == 75
    psutil.wait_procs(children, timeout=60)
    assert [child for child in children if child.is_running()] == []
    output = (tmp_path / "output.txt").read_text()
    assert "SIGTERM: finishing what is under way, then stopping. Once more stops at once" in output
    assert "What is done stays done: the same command continues." in output and "Traceback" not in output
    left = [path.name for path in (tmp_path / "out" / "corpus" / "work").rglob("*") if path.name.startswith(".")]
    assert left == [], "nothing is half written"
    ended = llmtrain("data", "run", "pipeline.yaml", "run.workers=2", folder=tmp_path)
    assert ended.returncode == 0 and "done before" in ended.stderr
    assert tree_hash(tmp_path / "out" / "corpus") == expected


def start_endless_task(folder: Path, *overrides: str) -> subprocess.Popen[str]:
    """A pipeline whose first task never ends, once it is there."""
    write_collection(folder, 4)
    write_pipeline(folder)
    place = "data_pipelines.pipeline.run:perform"
    line = [sys.executable, "-m", "tests.support.blocked_command", place, "data", "run", "pipeline.yaml", *overrides]
    environment = {**ENVIRONMENT, "PYTHONPATH": str(ROOT)}
    with (folder / "output.txt").open("w") as output:
        command = subprocess.Popen(line, cwd=folder, env=environment, stdout=output, stderr=output, text=True)
    wait_until(lambda: BLOCKED in (folder / "output.txt").read_text(), command)
    return command


def test_a_task_that_takes_too_long_is_abandoned(tmp_path: Path) -> None:
    command = start_endless_task(tmp_path, "run.grace_seconds=0.5")
    command.send_signal(signal.SIGUSR1)
    assert command.wait(timeout=60) == 75
    output = (tmp_path / "output.txt").read_text()
    assert "told to stop; not finished within run.grace_seconds = 0.5: abandoned" in output


def test_told_twice_it_stops_at_once(tmp_path: Path) -> None:
    command = start_endless_task(tmp_path)
    command.send_signal(signal.SIGTERM)
    wait_until(lambda: "SIGTERM: finishing" in (tmp_path / "output.txt").read_text(), command)
    command.send_signal(signal.SIGTERM)
    assert command.wait(timeout=60) == 143
