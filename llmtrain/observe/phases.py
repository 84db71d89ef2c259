"""The parts of a run that its time is divided into. Imports nothing: launchers that never train know them too."""

from typing import Literal, get_args

Phase = Literal["setup", "data", "step", "evaluate", "checkpoint"]
PHASES: tuple[Phase, ...] = get_args(Phase)
"""Where a run spends its time. Its first step belongs to the setup: compilers and allocators work in it."""
