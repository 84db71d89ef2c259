"""Signs between a launcher and its ranks, in memory that forked processes share: heartbeats, and the signal to stop.

There are no locks: each record has one writer, and a reader that sees an old one sees the new one next time.
"""

import logging
import mmap
import os
import signal
import struct
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Literal, get_args

from llmtrain.errors import EXIT_PREEMPTED, EXIT_TOLD_TWICE
from llmtrain.values.progress import PHASES, Phase

Heartbeat = Callable[[Phase, int], None]
"""Called by a rank that enters a phase, with the number of steps that the run has finished."""

Work = Literal["data", "step"]
"""Phases in which a rank works while others may wait for it."""

WORK: tuple[Work, ...] = get_args(Work)

WINDOW_STEPS = 5
"""Steps that a rank's work is added up over."""

NUM_WINDOWS = 64
"""Windows of a rank that can be read; older ones are overwritten."""

PLACE_BYTES = 120
"""The longest text of a rank's place in the code."""

# One machine word each, aligned: no reader ever sees half of one.
_RECORD = struct.Struct("=dqqq")
_COUNT = struct.Struct("=q")
_WANTED = struct.Struct("=q")
_WINDOW = struct.Struct(f"=qdd{PLACE_BYTES}s{PLACE_BYTES}s")
# Twice as many as can be read: a reader is never at the window that is being written.
_SLOTS = 2 * NUM_WINDOWS
_COUNT_AT = _RECORD.size
_WANTED_AT = _COUNT_AT + _COUNT.size
_WINDOWS_AT = _WANTED_AT + _WANTED.size
_RANK_BYTES = _WINDOWS_AT + _SLOTS * _WINDOW.size


@dataclass(frozen=True)
class Position:
    """A rank is in this phase since `since` (seconds of the machine's monotonic clock), `step` steps being done.

    Its attempt began after `first_step`.
    """

    phase: Phase
    step: int
    since: float
    first_step: int = 0


@dataclass(frozen=True)
class WorkWindow:
    """A rank's work in WINDOW_STEPS steps in a row, of which `step` was the last.

    `work` is the time, in seconds, in which it waited for no other rank; `places` where it was most of that, if that
    was asked for. Both by phase.
    """

    step: int
    work: Mapping[Work, float]
    places: Mapping[Work, str]


class HeartbeatBoard:
    """The positions of all ranks of one attempt, and their work. Make it before the ranks are forked."""

    def __init__(self, world_size: int, step: int) -> None:
        self._memory = mmap.mmap(-1, _RANK_BYTES * world_size)
        self.world_size = world_size
        for rank in range(world_size):
            self.heartbeat(rank)("setup", step)

    def heartbeat(self, rank: int) -> Heartbeat:
        """The function that a rank calls. The step of the first call is the one that its attempt continues from."""
        first_step: int | None = None

        def tell(phase: Phase, step: int) -> None:
            nonlocal first_step
            first_step = step if first_step is None else first_step
            self.put(rank, Position(phase, step, time.monotonic(), first_step))

        return tell

    def put(self, rank: int, position: Position) -> None:
        """Set where a rank is."""
        values = (position.since, PHASES.index(position.phase), position.step, position.first_step)
        _RECORD.pack_into(self._memory, rank * _RANK_BYTES, *values)

    def positions(self) -> list[Position]:
        """The present positions, by rank."""
        records = (_RECORD.unpack_from(self._memory, rank * _RANK_BYTES) for rank in range(self.world_size))
        return [Position(PHASES[phase], step, since, first) for since, phase, step, first in records]

    def add_window(self, rank: int, window: WorkWindow) -> None:
        """Add a rank's next window. Windows with the same number are about the same steps on all ranks."""
        number = self._count(rank)
        data, step = (window.places.get(phase, "").encode()[:PLACE_BYTES] for phase in WORK)
        values = (window.step, window.work["data"], window.work["step"], data, step)
        _WINDOW.pack_into(self._memory, self._slot(rank, number), *values)
        # The count afterwards: it tells readers that the window is whole.
        _COUNT.pack_into(self._memory, rank * _RANK_BYTES + _COUNT_AT, number + 1)

    def num_windows(self) -> int:
        """The number of windows that every rank has added."""
        return min(self._count(rank) for rank in range(self.world_size))

    def windows(self, number: int) -> list[WorkWindow]:
        """The window with this number, by rank: one of the last NUM_WINDOWS."""
        found = []
        for rank in range(self.world_size):
            step, data_work, step_work, *places = _WINDOW.unpack_from(self._memory, self._slot(rank, number))
            in_data, in_step = (place.rstrip(b"\0").decode("utf-8", "ignore") for place in places)
            work: dict[Work, float] = {"data": data_work, "step": step_work}
            found.append(WorkWindow(step, work, {"data": in_data, "step": in_step}))
        return found

    def want_places(self, rank: int, wanted: bool) -> None:
        """Ask a rank to find out where it spends its time, from its next step on, or no more."""
        _WANTED.pack_into(self._memory, rank * _RANK_BYTES + _WANTED_AT, wanted)

    def places_wanted(self, rank: int) -> bool:
        return bool(_WANTED.unpack_from(self._memory, rank * _RANK_BYTES + _WANTED_AT)[0])

    def _count(self, rank: int) -> int:
        return _COUNT.unpack_from(self._memory, rank * _RANK_BYTES + _COUNT_AT)[0]

    def _slot(self, rank: int, number: int) -> int:
        return rank * _RANK_BYTES + _WINDOWS_AT + number % _SLOTS * _WINDOW.size


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

    def __init__(self, plan: str = "saving after this step, then stopping", loss: str = "unsaved") -> None:
        """`plan` and `loss` are what is said when it is told to stop: what follows, and what a second signal costs."""
        self.announces = True
        self._plan, self._loss = plan, loss
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
            again = f" Once more stops at once, {self._loss}." if told in self._insistent else ""
            # Not through a logger: the signal may have interrupted one that holds its lock.
            sys.stderr.write(f"\n{told.name}: {self._plan}.{again}\n")


def exit_after_grace(
    stop: StopSignal, grace_seconds: float, failing: str = "not saved within launch.grace_seconds"
) -> None:
    """Let this process end with EXIT_PREEMPTED so long after it was told to stop, saved or not; 0: never.

    A save that is not done then leaves nothing that a later start would take for a checkpoint. `failing` is what the
    log then says, with the key of the time.
    """

    def wait() -> None:
        while not stop.requested:
            time.sleep(POLL_SECONDS)
        time.sleep(grace_seconds)
        _logger.warning("told to stop; %s = %g: abandoned", failing, grace_seconds)
        os._exit(EXIT_PREEMPTED)

    if grace_seconds > 0:
        threading.Thread(target=wait, name="grace", daemon=True).start()
