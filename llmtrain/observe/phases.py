"""The parts of a run that its time is divided into. Imports nothing: launchers that never train know them too."""

from typing import Literal, get_args

Section = Literal["setup", "data", "step", "evaluate", "checkpoint"]
SECTIONS: tuple[Section, ...] = get_args(Section)
"""Where a run spends its time. Its first step belongs to the setup: compilers and allocators work in it."""
