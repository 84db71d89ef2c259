"""The `llmtrain` command, which answers signals from its first moment on.

Whatever it is doing when it is told to stop ends, cleans up after itself, and leaves no traceback. Imports next to
nothing: signals are heard before anything that takes time is imported.
"""

import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

__all__ = ["main", "raising"]


SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""INT from a keyboard, TERM from schedulers and supervisors, HUP from a terminal that is closed."""

EXIT_CODE = 143
"""`llmtrain.errors.EXIT_TOLD_TWICE`, which takes time to import."""

_raises = False


def hear_signals() -> None:
    """Answer SIGNALS in this process from now on, but those that whoever started it has set to be ignored.

    Nothing begun yet, or told before, it ends at once. Inside `raising`, KeyboardInterrupt is raised.
    """
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _end)


@contextmanager
def raising() -> Iterator[None]:
    """Let the first signal raise KeyboardInterrupt, so that what has been begun is put in order."""
    global _raises
    _raises = True
    try:
        yield
    finally:
        _raises = False


def _end(number: int, frame: FrameType | None) -> None:
    global _raises
    if _raises:
        _raises = False
        raise KeyboardInterrupt
    # Nothing has begun, so nothing is to be put in order: the interpreter's own end may wait for threads and imports.
    sys.stderr.write("interrupted\n")
    sys.stderr.flush()
    os._exit(EXIT_CODE)


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Run the command with the given arguments, and end the process with its exit code.

    Without arguments it is the process's own command line that is run, and the process answers signals.
    """
    if args is None:
        hear_signals()
    from llmtrain.cli.app import main as run

    run(args)
