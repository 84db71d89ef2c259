"""How much a rank works, and where.

The ranks of a step need the same time for it, however fast they are: who is done early waits for the others. What tells
them apart is the time in which they do not wait, so the waiting is measured. Where a rank works is only looked at once
it is found slow.
"""

import threading
import time
from collections.abc import Callable
from typing import Any

from torch.distributed import Work as Collective

from launch.rank.heartbeat import WINDOW_STEPS, Heartbeat, Work, WorkWindow
from launch.supervision.stack_sampler import Looks
from llmtrain.values.progress import Phase

PREPARING = "batches"
"""How the names of the threads of llmtrain/data/loader.py begin, for which the phase data waits."""


class WorkMeter:
    """A rank's heartbeat that also measures its work, and tells that of every WINDOW_STEPS steps.

    The work of a step is the time from asking for its batches to its end, without the time in collectives: where their
    results are waited for on the host, as with gloo. The first step does not count: compilers work in it; nor does what
    is between steps: recording, evaluation, checkpoints. Make one in the main thread, one in a process.
    """

    def __init__(
        self, heartbeat: Heartbeat, publish: Callable[[WorkWindow], None], look_wanted: Callable[[], bool]
    ) -> None:
        self._heartbeat, self._publish = heartbeat, publish
        self._look_wanted = look_wanted
        self._looks: Looks | None = None
        self._phase: Phase = "setup"
        self._step: int | None = None
        self._num_steps = -1  # finished ones, after the first
        self._work: dict[Work, float] = {"data": 0.0, "step": 0.0}
        self._waited = 0.0
        self._began: tuple[Work, float] | None = None
        self._measure_waiting()

    def __call__(self, phase: Phase, step: int) -> None:
        self._heartbeat(phase, step)
        now = time.perf_counter() - self._waited
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
                self._publish(WorkWindow(step, self._work, self._looks.places() if self._looks else {}))
            self._work = {"data": 0.0, "step": 0.0}
        if self._look_wanted() and not self._looks:
            self._looks = Looks(self._at_work, __file__, PREPARING)
        elif self._looks and not self._look_wanted():
            self._looks.end()
            self._looks = None

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
