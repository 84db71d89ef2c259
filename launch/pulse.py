"""Where each rank is, for whoever watches over them: in memory that forked ranks share with their launcher."""

import mmap
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass

from llmtrain.observe.monitor import SECTIONS, Section

Pulse = Callable[[Section, int], None]
"""Called by a rank that enters a section, with the number of steps that the run has finished."""

# One machine word each, aligned: no reader ever sees half of one.
_RECORD = struct.Struct("=dqqq")


@dataclass(frozen=True)
class Position:
    """A rank is in this section since `since` (seconds of the machine's monotonic clock), `step` steps being done.

    Its attempt began after `first_step`.
    """

    section: Section
    step: int
    since: float
    first_step: int = 0


class PulseBoard:
    """The positions of all ranks of one attempt. Make it before the ranks are forked."""

    def __init__(self, world_size: int, step: int) -> None:
        self._memory = mmap.mmap(-1, _RECORD.size * world_size)
        self._world_size = world_size
        for rank in range(world_size):
            self.pulse(rank)("setup", step)

    def pulse(self, rank: int) -> Pulse:
        """What a rank calls. The step of the first call is the one that its attempt continues from."""
        offset = rank * _RECORD.size
        first_step: int | None = None

        def tell(section: Section, step: int) -> None:
            nonlocal first_step
            first_step = step if first_step is None else first_step
            _RECORD.pack_into(self._memory, offset, time.monotonic(), SECTIONS.index(section), step, first_step)

        return tell

    def positions(self) -> list[Position]:
        """Where the ranks are now, by rank."""
        records = (_RECORD.unpack_from(self._memory, rank * _RECORD.size) for rank in range(self._world_size))
        return [Position(SECTIONS[section], step, since, first) for since, section, step, first in records]
