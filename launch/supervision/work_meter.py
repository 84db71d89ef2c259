"""Meters of a rank's work, and of the places where it works. Off where observe.straggler_score is 0.

The ranks of a step need the same time for it, however fast they are: who is done early waits for the others. What tells
them apart is the time in which they do not wait, so the waiting is measured. Only where a rank is found slow are its
stacks sampled, many times a second.
"""

import faulthandler
import re
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.distributed import Work as Collective

from launch.rank.signals import WINDOW_STEPS, Heartbeat, Work, WorkWindow
from llmtrain.values.progress import Phase

SAMPLE_SECONDS = 0.02
"""Time between two samples of the stacks."""

STANDSTILL = "nowhere: its process was stopped, or got no processor"

STANDSTILL_SECONDS = 0.08
"""A sample that is later than this, no processor having been used, has seen a standstill."""

_THREAD = re.compile(r"^(?:Current thread|Thread) 0x([0-9a-f]+)", re.MULTILINE)
_FRAME = re.compile(r'^  File "([^"]*)", line (\d+) in (\S+)', re.MULTILINE)
_THREAD_FILES = re.compile(r"/threading\.py$")
_NO_PLACE = re.compile(r"/torch/|/threading\.py$|/concurrent/futures/")

Frame = tuple[str, str, str]
"""File, line and function."""


class StackSampler:
    """Samples the main thread's stack from now on, and counts in which line it is, by phase.

    Stacks are written by faulthandler, which reads them as they are: Python's own frames of a thread that runs on
    (sys._current_frames) have crashed CPython 3.11.
    """

    def __init__(self, phase: Callable[[], Work | None], waiting_file: str, preparing: str) -> None:
        """`phase` says in which one the main thread is at work; None: in none. It waits, which does not count, where
        its innermost frame is in `waiting_file`. Where it waits for another thread, that is taken whose name begins
        with `preparing`. Made in the main thread."""
        self._phase, self._waiting_file, self._preparing = phase, waiting_file, preparing
        self._main = threading.get_ident()
        self._counts: dict[Work, Counter[str]] = {}
        self._lock = threading.Lock()
        self._ended = threading.Event()
        threading.Thread(target=self._sample_often, daemon=True, name="stack-sampler").start()

    def places(self) -> dict[Work, str]:
        """The place where it was most often since the last call, by phase: `function (file:line)`."""
        with self._lock:
            counts, self._counts = self._counts, {}
        return {phase: places.most_common(1)[0][0] for phase, places in counts.items()}

    def end(self) -> None:
        """Sample no more."""
        self._ended.set()

    def _sample_often(self) -> None:
        with tempfile.TemporaryFile() as file:
            now, ran = time.monotonic(), time.process_time()
            while not self._ended.wait(SAMPLE_SECONDS):
                before, ran_before = now, ran
                now, ran = time.monotonic(), time.process_time()
                file.seek(0)
                file.truncate()
                phase = self._phase()  # before the dump: afterwards the thread may have gone on to the next one
                faulthandler.dump_traceback(file)
                file.seek(0)
                if phase is None:
                    continue
                stopped = now - before > STANDSTILL_SECONDS and ran - ran_before < (now - before) / 2
                place = STANDSTILL if stopped else self._place(file.read().decode("utf-8", "replace"))
                if place:
                    # A standstill counts for all the samples that it has kept from being taken.
                    samples = round((now - before) / SAMPLE_SECONDS) if stopped else 1
                    with self._lock:
                        self._counts.setdefault(phase, Counter())[place] += samples

    def _place(self, dump: str) -> str:
        """The place of the main thread; empty where it waits."""
        stacks = stacks_of(dump)
        frames = stacks.get(self._main, [])
        if not frames or frames[0][0] == self._waiting_file:
            return ""
        if _THREAD_FILES.search(frames[0][0]):
            names = {thread.ident: thread.name for thread in threading.enumerate()}
            others = [stack for ident, stack in stacks.items() if names.get(ident, "").startswith(self._preparing)]
            frames = next((stack for stack in others if stack), frames)
        file, line, function = next((frame for frame in frames if not _NO_PLACE.search(frame[0])), frames[0])
        return f"{function} ({Path(file).name}:{line})"


def stacks_of(dump: str) -> dict[int, list[Frame]]:
    """The frames of each thread of a dump by faulthandler, innermost first, by the thread's ident."""
    _, *parts = _THREAD.split(dump)
    return {int(ident, 16): _FRAME.findall(text) for ident, text in zip(parts[::2], parts[1::2], strict=True)}


PREPARING = "batches"
"""Prefix of the names of the threads in llmtrain/data/loader.py, for which the phase data waits."""


class WorkMeter:
    """A rank's heartbeat that also measures its work, and tells that of every WINDOW_STEPS steps.

    The work of a step is the time from asking for its batches to its end, without the time in collectives: where their
    results are waited for on the host, as with gloo. The first step does not count: compilers work in it; nor does what
    is between steps: recording, evaluation, checkpoints. Make one in the main thread, one in a process.
    """

    def __init__(
        self, heartbeat: Heartbeat, publish: Callable[[WorkWindow], None], places_wanted: Callable[[], bool]
    ) -> None:
        self._heartbeat, self._publish = heartbeat, publish
        self._places_wanted = places_wanted
        self._sampler: StackSampler | None = None
        self._phase: Phase = "setup"
        self._step: int | None = None
        self._num_steps = -1  # finished ones, after the first
        self._work: dict[Work, float] = {"data": 0.0, "step": 0.0}
        self._waited = 0.0
        self._began: tuple[Work, float] | None = None
        self._measure_waiting()

    def __call__(self, phase: Phase, step: int) -> None:
        self._heartbeat(phase, step)
        now = time.perf_counter() - self._waited  # a clock that stands still while this rank waits for others
        if self._began:
            self._work[self._began[0]] += now - self._began[1]
        # A step begins when its batches are there: what is called a step before that are the gaps between steps.
        work: Work | None = "data" if phase == "data" else "step" if self._phase == "data" else None
        self._began = (work, now) if work else None
        finished = phase in ("step", "setup") and self._step is not None and step == self._step + 1
        self._phase, self._step = phase, step
        if finished:
            self._finish_step(step)

    def _finish_step(self, step: int) -> None:
        self._num_steps += 1
        if self._num_steps % WINDOW_STEPS == 0:
            if self._num_steps:
                self._publish(WorkWindow(step, self._work, self._sampler.places() if self._sampler else {}))
            self._work = {"data": 0.0, "step": 0.0}
        if self._places_wanted() and not self._sampler:
            self._sampler = StackSampler(self._at_work, __file__, PREPARING)
        elif self._sampler and not self._places_wanted():
            self._sampler.end()
            self._sampler = None

    def _at_work(self) -> Work | None:
        """The phase that counts now. Asked by another thread."""
        began = self._began
        return began[0] if began else None

    def _measure_waiting(self) -> None:
        """Let every wait of this thread for a collective add to what has been waited."""
        wait, main = Collective.wait, threading.get_ident()

        def measured(collective: Collective, *rest: Any, **named: Any) -> Any:
            if threading.get_ident() != main:
                return wait(collective, *rest, **named)
            began = time.perf_counter()
            try:
                return wait(collective, *rest, **named)
            finally:
                self._waited += time.perf_counter() - began

        Collective.wait = measured  # type: ignore[method-assign]  # PyTorch offers no hook
