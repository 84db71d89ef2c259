"""The folder beside its destination that a data set is written into, which goes away however the writing ends.

A signal that asks to stop ends the writing like an error. What a process could not clear, because it was killed or the
machine went down, the next one that writes there does: a lock tells whether anybody still writes.
"""

import glob
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from filelock import lock_descriptor

STOPPING = (signal.SIGTERM, signal.SIGHUP)


@contextmanager
def work_folder(out: Path) -> Iterator[Path]:
    """An empty folder beside `out`. The caller renames it to `out`; where it does not, the folder is removed."""
    out = out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    _clear_abandoned(out)
    folder = out.with_name(f".{out.name}.writing-{os.getpid()}")
    with _stopping_raises():
        folder.mkdir()
        try:
            lock = os.open(folder, os.O_RDONLY)
            try:
                # A file system without locks, such as some of the network, keeps what is abandoned.
                with suppress(OSError):
                    lock_descriptor(lock, blocking=False)
                yield folder
            finally:
                os.close(lock)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _clear_abandoned(out: Path) -> None:
    for folder in sorted(out.parent.glob(f".{glob.escape(out.name)}.writing-*")):
        with suppress(OSError):
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                if lock_descriptor(lock, blocking=False):
                    shutil.rmtree(folder)
                    print(f"removed {folder}: what an interrupted command had begun to write", file=sys.stderr)
            finally:
                os.close(lock)


@contextmanager
def _stopping_raises() -> Iterator[None]:
    """Signals that would end the process at once end it as an exception, with the exit code that shells expect."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    heard = [number for number in STOPPING if signal.getsignal(number) != signal.SIG_IGN]  # as nohup sets it
    before = {number: signal.signal(number, stop) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
