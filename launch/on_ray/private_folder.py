"""A folder of this process alone, which a later start removes where this process was killed."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import lock_descriptor

PREFIX = "llmtrain-ray-"
LONGEST_PATH = 38
"""Ray puts sockets into a folder in it with one letter, with names of up to 66 characters; a socket's path may have
107."""


@contextmanager
def private_folder() -> Iterator[Path]:
    """A new folder that only this user may enter, removed in the end. Folders whose owner is dead are removed first.

    It is short enough for Ray's sockets: in the system's folder for temporary files, or else in /tmp.
    """
    parent = Path(tempfile.gettempdir())
    if len(str(parent)) + len(PREFIX) + 9 > LONGEST_PATH:
        parent = Path("/tmp")
    _remove_abandoned(parent)
    # It gets its name once it is locked: under that name it is never found without an owner that lives.
    unnamed = Path(tempfile.mkdtemp(prefix=f".{PREFIX}", dir=parent))
    lock = os.open(unnamed, os.O_RDONLY | os.O_DIRECTORY)
    lock_descriptor(lock)
    folder = unnamed.rename(parent / unnamed.name.removeprefix("."))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _remove_abandoned(parent: Path) -> None:
    for folder in parent.glob(f"{PREFIX}*"):
        # Others' folders, and those that are gone meanwhile, are not ours to remove.
        with suppress(OSError):
            if folder.is_symlink() or folder.stat().st_uid != os.getuid():
                continue
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                if lock_descriptor(lock, blocking=False):
                    shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)
