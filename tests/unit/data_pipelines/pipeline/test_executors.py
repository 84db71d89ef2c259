"""Executors that are told to stop: what is under way ends, nothing else begins, and it is said."""

import os
import signal
import time
from pathlib import Path

import pytest

from data_pipelines.pipeline.executors import InThisProcess, Processes, UntilStopped, executor_of
from llmtrain.errors import EXIT_PREEMPTED, LlmtrainError, StoppedError


def double(number: int) -> int:
    return 2 * number


def die_once(path: Path) -> str:
    """The first time, the processes are ended as a scheduler ends those of a job."""
    if not path.exists():
        path.touch()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
    return path.name


def test_not_told_to_stop_it_changes_nothing() -> None:
    with executor_of(1, lambda: False) as executor:
        assert list(executor.each(double, [1, 2, 3])) == [(1, 2), (2, 4), (3, 6)]


def test_told_to_stop_it_begins_no_other_call_and_names_the_next() -> None:
    done: list[int] = []
    with pytest.raises(StoppedError, match=r"^stopped before 3\. What is done stays done") as stopped:
        for number, _ in UntilStopped(InThisProcess(), lambda: 2 in done).each(double, [1, 2, 3, 4]):
            done.append(number)
    assert done == [1, 2] and stopped.value.exit_code == EXIT_PREEMPTED


def test_told_to_stop_when_nothing_is_left_it_has_finished() -> None:
    done: list[int] = []
    for number, _ in UntilStopped(InThisProcess(), lambda: 2 in done).each(double, [1, 2]):
        done.append(number)
    assert done == [1, 2]


def test_what_fails_while_it_stops_is_part_of_stopping() -> None:
    """A scheduler tells everything in a job to stop: a cluster, or the processes, may be gone before their driver."""

    def gone(number: int) -> int:
        raise LlmtrainError("the head is gone")

    with pytest.raises(LlmtrainError, match=r"^the head is gone$"):
        list(UntilStopped(InThisProcess(), lambda: False).each(gone, [1]))
    asked = iter([False, True, True])
    with pytest.raises(StoppedError, match=r"tasks under way \(the head is gone\): they are done again next time"):
        list(UntilStopped(InThisProcess(), lambda: next(asked)).each(gone, [1]))


def test_processes_that_are_ended_are_started_again_unless_it_is_to_stop(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    told = False
    processes = Processes(1, lambda: told)
    try:
        assert list(UntilStopped(processes, lambda: told).each(die_once, [first])) == [(first, "first")]
        calls = UntilStopped(processes, lambda: told and second.exists()).each(die_once, [second])
        told = True
        with pytest.raises(StoppedError, match=r"tasks under way \(their processes were ended\)"):
            list(calls)
    finally:
        processes.close()
