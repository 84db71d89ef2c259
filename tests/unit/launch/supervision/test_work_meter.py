"""What counts as a rank's work, and where it is found to be."""

import threading
import time
from typing import Any

import pytest
from torch.distributed import Work as Collective

from launch.rank.signals import WINDOW_STEPS, WorkWindow
from launch.supervision.work_meter import SAMPLE_SECONDS, STANDSTILL, StackSampler, WorkMeter, stacks_of
from llmtrain.values.progress import Phase

DUMP = """\
Thread 0x00007f0000000001 (most recent call first):
  File "/usr/lib/python3.11/threading.py", line 331 in wait
  File "/usr/lib/python3.11/threading.py", line 629 in wait

Current thread 0x00007f0000000002 (most recent call first):
  File "/src/launch/supervision/work_meter.py", line 80 in _sample_often
"""


class Steps:
    """A meter and a clock that moves only when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.windows: list[WorkWindow] = []
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(Collective, "wait", self.wait_for)
        self.meter = WorkMeter(lambda phase, step: None, self.windows.append, lambda: False)
        self.measured: Any = Collective.wait

    def wait_for(self, seconds: float) -> None:
        self.now += seconds

    def spend(self, phase: Phase, step: int, seconds: float) -> None:
        self.meter(phase, step)
        self.now += seconds

    def step(self, step: int, data: float, work: float, waiting: float) -> None:
        """One step as the monitor tells it, with recording, an evaluation and a checkpoint after it."""
        self.spend("data", step - 1, data)
        self.spend("step", step - 1, work)
        self.measured(waiting)
        self.spend("step", step, 100.0)
        for phase in ("evaluate", "checkpoint"):
            self.spend(phase, step, 100.0)
            self.spend("step", step, 100.0)


def test_work_is_the_time_of_steps_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = Steps(monkeypatch)
    steps.meter("setup", 7)
    steps.step(8, data=50, work=50, waiting=50)
    for number in range(9, 9 + 2 * WINDOW_STEPS):
        steps.step(number, data=1, work=2, waiting=4)
    first, second = steps.windows
    assert (first.step, second.step) == (13, 18)
    assert first.work == second.work == {"data": WINDOW_STEPS * 1, "step": WINDOW_STEPS * 2}


def test_steps_that_are_gone_back_to_count_again(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = Steps(monkeypatch)
    steps.meter("setup", 0)
    for number in (1, 2, 3, 2, 3, 4):
        steps.step(number, data=1, work=2, waiting=4)
    assert [window.step for window in steps.windows] == [4]
    assert steps.windows[0].work == {"data": 5, "step": 10}


def test_what_other_threads_wait_for_is_no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = Steps(monkeypatch)
    steps.meter("setup", 0)
    for number in range(1, 2 + WINDOW_STEPS):
        steps.meter("data", number - 1)
        steps.meter("step", number - 1)
        thread = threading.Thread(target=steps.measured, args=(3.0,))
        thread.start()
        thread.join()
        steps.meter("step", number)
    assert steps.windows[0].work["step"] == WINDOW_STEPS * 3.0


def test_the_line_that_takes_longest_is_found() -> None:
    sampler = StackSampler(lambda: "step", "/nowhere.py", "preparing")
    slowly()
    sampler.end()
    place = sampler.places()["step"]
    assert place.startswith("slowly (test_work_meter.py:")
    assert sampler.places() == {}


def test_a_main_thread_that_waits_is_at_no_place() -> None:
    sampler = StackSampler(lambda: "step", __file__, "preparing")
    slowly()
    sampler.end()
    assert set(sampler.places().values()) <= {STANDSTILL}, "a busy machine may have taken the processor away"


def test_of_a_wait_for_another_thread_the_place_is_where_that_is() -> None:
    sampler = StackSampler(lambda: "data", "/nowhere.py", "preparing")
    thread = threading.Thread(target=slowly, name="preparing_0")
    thread.start()
    thread.join()
    sampler.end()
    assert sampler.places()["data"].startswith("slowly (test_work_meter.py:")


def slowly() -> None:
    time.sleep(20 * SAMPLE_SECONDS)


def test_stacks_are_told_apart() -> None:
    stacks = stacks_of(DUMP)
    assert stacks[0x7F0000000001][1] == ("/usr/lib/python3.11/threading.py", "629", "wait")
    assert stacks[0x7F0000000002] == [("/src/launch/supervision/work_meter.py", "80", "_sample_often")]
