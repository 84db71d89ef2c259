"""The folders of a run's checkpoints: their names, which of them stay, and the room that they need on a disk.

Imports no torch: what a path means, and what does not fit, is told before a run takes any device.
"""

import errno
import math
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from llmtrain.config.schema import CheckpointConfig
from llmtrain.errors import SaveError
from llmtrain.words import bytes_text

CHECKPOINTS = "checkpoints"
"""The folder inside a run folder."""

MANIFEST = "manifest.json"
LONGEST_MANIFEST = 256 << 20
"""Some hundred bytes per fragment: those of a thousand ranks with a thousand tensors each."""
MANIFEST_HASH = "manifest.json.sha256"
CONFIG = "config.yaml"
STATE = "state.json"
BEST_BY = "best_by"
"""In a manifest: the name of its metric; older ones have none, and it is the loss."""

TEACHER = "teacher"
"""In a manifest's `about`: path and manifest_sha256 of the checkpoint that taught it."""

BASE = "base"
"""In a manifest's `about`: path and manifest_sha256 of the checkpoint that has its frozen weights."""

_STEP_FOLDER = re.compile(r"^step-(\d{8,})$")


def step_folder_name(step: int) -> str:
    return f"step-{step:08d}"


def step_of_folder(name: str) -> int | None:
    """The step of a published checkpoint's folder; None for any other name."""
    match = _STEP_FOLDER.match(name)
    return int(match[1]) if match else None


def wrong_name(folder: Path, step: Any) -> str | None:
    """The fault of a checkpoint's folder that has the name of another step; None for a right name."""
    named = step_of_folder(folder.name)
    if named is None or named == step:
        return None
    return f"{folder}: its name says step {named}, but it holds step {step}. Give it the name {step_folder_name(step)}."


def checkpoint_steps(checkpoints: Path) -> list[int]:
    """Steps of the checkpoints in a folder, newest first, whether valid or not."""
    if not checkpoints.is_dir():
        return []
    steps = (step_of_folder(entry.name) for entry in checkpoints.iterdir())
    return sorted((step for step in steps if step is not None), reverse=True)


def is_checkpoint(path: Path) -> bool:
    """True for the path of one checkpoint, whole or damaged."""
    # The hash, not the manifest: data sets have a manifest.json too.
    return path.is_dir() and ((path / MANIFEST_HASH).is_file() or step_of_folder(path.resolve().name) is not None)


def folder_of_checkpoints(path: Path) -> Path | None:
    """The folder with the checkpoints of a run or an import, or a path that is it; None where there are none."""
    return next((folder for folder in (path / CHECKPOINTS, path) if checkpoint_steps(folder)), None)


def checkpoints_at(path: Path) -> list[Path]:
    """The checkpoints with a manifest that a path means: itself, or those of a run, the newest first."""
    folder = folder_of_checkpoints(path)
    steps = checkpoint_steps(folder) if folder else []
    found = [path] if is_checkpoint(path) else [folder / step_folder_name(step) for step in steps if folder]
    return [each for each in found if (each / MANIFEST).is_file()]


def nearest_checkpoint(path: Path) -> Path | None:
    """The likely meaning of a wrong path: a run below it, or a checkpoint or a run beside or above it.

    None where that is not found, or where what is around the path may not be looked at.
    """
    try:
        return _nearest(path)
    except OSError:
        return None


def _nearest(path: Path) -> Path | None:
    below = sorted(path.iterdir()) if path.is_dir() else []
    for entry in below:
        if folder_of_checkpoints(entry):
            return entry
    for above in path.absolute().parents:
        if is_checkpoint(above):
            return _as_written(above, path)
        folder = folder_of_checkpoints(above)
        if folder is not None:
            wanted = int("".join(filter(str.isdigit, path.name)) or 10**12)
            step = min(checkpoint_steps(folder), key=lambda step: abs(step - wanted))
            return _as_written(folder / step_folder_name(step), path)
        if above.is_dir():
            runs = [entry.name for entry in sorted(above.iterdir()) if folder_of_checkpoints(entry)]
            similar = get_close_matches(path.absolute().relative_to(above).parts[0], runs, 1)
            return _as_written(above / similar[0], path) if similar else None
    return None


def _as_written(found: Path, given: Path) -> Path:
    """Relative to the working directory where the given path is."""
    here = Path.cwd()
    return found.relative_to(here) if not given.is_absolute() and found.is_relative_to(here) else found


def steps_to_remove(metrics: Mapping[int, float | None], settings: CheckpointConfig, rises: bool = False) -> list[int]:
    """Which checkpoints to delete, oldest first.

    Kept are the newest `keep`, every multiple of `keep_every_steps`, and with `keep_best` the best by `best_of`.
    `metrics` holds all that exist, None where a checkpoint has no metric.
    """
    kept = set(sorted(metrics)[-settings.keep :])
    if settings.keep_every_steps:
        kept |= {step for step in metrics if step % settings.keep_every_steps == 0}
    best = best_of(metrics, rises)
    if settings.keep_best and best is not None:
        kept.add(best[0])
    return sorted(metrics.keys() - kept)


def best_of(metrics: Mapping[int, float | None], rises: bool = False) -> tuple[int, float] | None:
    """The step with the lowest metric, the highest where it `rises` (of equal ones the oldest), and that metric; None
    where no step has one."""
    measured = [(metric, step) for step, metric in metrics.items() if metric is not None]
    if not measured:
        return None
    metric, step = min(measured, key=lambda found: (-found[0] if rises else found[0], found[1]))
    return step, metric


def most_at_once(settings: CheckpointConfig, total_steps: int) -> int:
    """How many checkpoints lie side by side at most, the one being written included."""
    every = settings.every_steps or total_steps
    kept = settings.keep + settings.keep_best
    if settings.keep_every_steps:
        kept += total_steps // math.lcm(every, settings.keep_every_steps)
    return min(math.ceil(total_steps / every), kept + 1)


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
    """The bytes that the checkpoints of a run still need in `folder`, and those that are free (None: not known).

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


def save_error(path: Path, needed: int, error: OSError) -> SaveError:
    """The error for a write that the file system refused. `needed` are the bytes to be written, 0 if not known."""
    free = free_bytes(path)
    sizes = f" Needed: {bytes_text(needed)}." if needed else ""
    sizes += f" Free: {bytes_text(free)}." if free is not None else ""
    advice = _WHAT_TO_DO.get(error.errno or 0, "Look at the folder and its file system.")
    return SaveError(f"{path}: the checkpoint could not be written: {error.strerror or error}.{sizes} {advice}")
