"""Being told to stop: the step is finished and saved; told twice, the process ends at once."""

import logging
import mmap
import os
import signal
import sys
import threading
import time
from types import FrameType, TracebackType

from llmtrain.errors import EXIT_PREEMPTED, EXIT_TOLD_TWICE

_logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""TERM from schedulers and supervisors, INT from a keyboard, USR1 as Slurm's warning before the time limit."""


POLL_SECONDS = 0.1


class StopSignal:
    """A flag that the loop reads once per step. As a context manager it listens to SIGNALS and then restores them.

    Processes forked while it listens go on listening, and hear what any of them is told. What counts as told twice
    counts in each process by itself: a keyboard or a scheduler may tell all of them at the same moment. In a Slurm job
    only a keyboard insists: there Slurm and the batch script both tell every process, and Slurm has KILL.
    """

    def __init__(self) -> None:
        self.announces = True
        self._insistent = (signal.SIGINT,) if "SLURM_JOB_ID" in os.environ else SIGNALS
        self._told = False
        self._anybody_told = mmap.mmap(-1, 1)  # memory that forked processes share
        self._before: dict[signal.Signals, object] = {}

    @property
    def requested(self) -> bool:
        return self._anybody_told[0] != 0

    def __enter__(self) -> "StopSignal":
        self._before = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal.signal returned

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        told = signal.Signals(number)
        if self._told:
            if told in self._insistent:
                os._exit(EXIT_TOLD_TWICE)  # not sys.exit: cleaning up may wait for the very collective that hangs
            return
        self._told = True
        self._anybody_told[0] = 1
        if self.announces:
            again = " Once more stops at once, unsaved." if told in self._insistent else ""
            # Not through a logger: the signal may have interrupted one that holds its lock.
            sys.stderr.write(f"\n{told.name}: saving after this step, then stopping.{again}\n")


def exit_after_grace(stop: StopSignal, grace_seconds: float) -> None:
    """Let this process end with EXIT_PREEMPTED so long after it was told to stop, saved or not; 0: never.

    A save that is not done then leaves nothing that a later start would take for a checkpoint.
    """

    def wait() -> None:
        while not stop.requested:
            time.sleep(POLL_SECONDS)
        time.sleep(grace_seconds)
        _logger.warning("told to stop; not saved within launch.grace_seconds = %g: abandoned", grace_seconds)
        os._exit(EXIT_PREEMPTED)

    if grace_seconds > 0:
        threading.Thread(target=wait, name="grace", daemon=True).start()
