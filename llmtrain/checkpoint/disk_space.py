"""Room for checkpoints on a disk: how much they need, how much is there, and what is said where a save fails.

Imports no torch: what does not fit is told before a run takes any device.
"""

import errno
import os
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from llmtrain.checkpoint.folders import checkpoint_steps
from llmtrain.checkpoint.retention import most_at_once
from llmtrain.config.schema import CheckpointConfig
from llmtrain.errors import SaveError
from llmtrain.words import bytes_text

_FREE_SPACE = "Free space there, lower checkpoint.keep, or set output_dir to a larger file system."
_MAKE_WRITABLE = "Make the folder writable, or set output_dir to one that is."
_MOVE_AWAY = "Something else lies where the folder should be: move it away."
_WHAT_TO_DO = {
    errno.ENOSPC: _FREE_SPACE,
    errno.EDQUOT: "The quota is used up (`quota -s`), whatever the disk has free. " + _FREE_SPACE,
    errno.EFBIG: "Files may not become that large here: raise the limit (`ulimit -f`), or set another output_dir.",
    errno.EROFS: _MAKE_WRITABLE,
    errno.EACCES: _MAKE_WRITABLE,
    errno.EPERM: _MAKE_WRITABLE,
    errno.ENOTDIR: _MOVE_AWAY,
    errno.EEXIST: _MOVE_AWAY,
    errno.EIO: "The disk or the way to it fails: look into the system's log (`dmesg`), or set another output_dir.",
}


@dataclass(frozen=True)
class Room:
    """What the checkpoints of a run still need in `folder`, and what is free there (None: nobody can say).

    `needed_bytes` are for the saves that must work: one more, beside an older one that stays until it is whole.
    `planned_bytes` are for all that will lie side by side at the run's fullest moment.
    """

    folder: Path
    checkpoint_bytes: int
    needed_bytes: int
    planned_bytes: int
    free_bytes: int | None


def plan_room(folder: Path, size_bytes: int, settings: CheckpointConfig, total_steps: int) -> Room:
    """The room for checkpoints of a size, less what already lies in the run's `checkpoints` folder."""
    present = checkpoint_steps(folder)
    most = most_at_once(settings, total_steps)
    if present and present[0] >= total_steps:  # it is done
        missing = least = 0
    else:
        missing = max(1, most - len(present))
        least = max(1, min(2, most) - len(present))
    return Room(folder, size_bytes, size_bytes * least, size_bytes * missing, free_bytes(folder))


def free_bytes(path: Path) -> int | None:
    """Free bytes where a path is or will be, asked of the nearest folder above that is there; never raises."""
    for folder in (path, *path.absolute().parents):
        with suppress(OSError):
            return shutil.disk_usage(folder).free
    return None


def require_room(folder: Path, needed: int) -> None:
    """Raise SaveError where `needed` bytes surely do not fit: to be told now is better than after minutes."""
    free = free_bytes(folder)
    if free is not None and free < needed:
        raise save_error(folder, needed, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))


def save_error(path: Path, needed: int, error: OSError) -> SaveError:
    """What the file system's refusal means. `needed` is the size of what was to be written, 0 where nobody knows."""
    free = free_bytes(path)
    sizes = f" Needed: {bytes_text(needed)}." if needed else ""
    sizes += f" Free: {bytes_text(free)}." if free is not None else ""
    advice = _WHAT_TO_DO.get(error.errno or 0, "Look at the folder and its file system.")
    return SaveError(f"{path}: the checkpoint could not be written: {error.strerror or error}.{sizes} {advice}")
