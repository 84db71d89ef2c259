"""`llmtrain data run` is killed at random moments, its workers too: the result is that of an undisturbed run."""

import os
import random
import signal
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.support.collections import run_quietly, tree_hash, write_collection, write_pipeline
from tests.support.command import llmtrain, start_llmtrain, wait_until


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


def test_told_to_stop_the_command_ends_and_continues(tmp_path: Path) -> None:
    write_collection(tmp_path, 60)
    write_pipeline(tmp_path)
    done = tmp_path / "out" / "corpus" / "done"
    command = start_llmtrain("data", "run", "pipeline.yaml", "run.workers=2", folder=tmp_path)
    wait_until(lambda: done.is_dir() and len(list(done.iterdir())) >= 3, command)
    children = workers_of(command.pid)
    command.send_signal(signal.SIGTERM)
    assert command.wait(timeout=60) == 143
    psutil.wait_procs(children, timeout=60)
    assert [child for child in children if child.is_running()] == []
    assert "Traceback" not in (tmp_path / "output.txt").read_text()
    ended = llmtrain("data", "run", "pipeline.yaml", "run.workers=2", folder=tmp_path)
    assert ended.returncode == 0 and "done before" in ended.stderr
