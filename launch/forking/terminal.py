"""The terminal of whoever started a run, for ranks elsewhere that print to it."""

import os
import shutil
import sys
import termios
from dataclasses import dataclass


@dataclass(frozen=True)
class Terminal:
    """A terminal's size in characters, and its kind, as TERM in the environment names it."""

    columns: int
    rows: int
    kind: str


def own_terminal() -> Terminal | None:
    """What this process prints to; None where that is no terminal."""
    if not sys.stderr.isatty():
        return None
    columns, rows = shutil.get_terminal_size()
    return Terminal(columns, rows, os.environ.get("TERM", "dumb"))


def open_terminal(like: Terminal) -> tuple[int, int]:
    """The descriptors to read from and to print to of a new terminal of that size. Nothing printed is changed."""
    reading, printing = os.openpty()
    termios.tcsetwinsize(printing, (like.rows, like.columns))
    modes = termios.tcgetattr(printing)
    modes[1] &= ~termios.OPOST
    termios.tcsetattr(printing, termios.TCSANOW, modes)
    return reading, printing
