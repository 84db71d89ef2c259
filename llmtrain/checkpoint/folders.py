"""Where the checkpoints of a run are, by names alone. Imports no torch: what a path means is told within a second."""

import re
from difflib import get_close_matches
from pathlib import Path
from typing import Any

CHECKPOINTS = "checkpoints"
"""The folder inside a run folder."""

MANIFEST = "manifest.json"
LONGEST_MANIFEST = 256 << 20
"""Some hundred bytes per fragment: those of a thousand ranks with a thousand tensors each."""
MANIFEST_HASH = "manifest.json.sha256"
CONFIG = "config.yaml"
STATE = "state.json"

_STEP_FOLDER = re.compile(r"^step-(\d{8,})$")


def step_folder_name(step: int) -> str:
    return f"step-{step:08d}"


def step_of_folder(name: str) -> int | None:
    """The step of a published checkpoint's folder; None for any other name."""
    match = _STEP_FOLDER.match(name)
    return int(match[1]) if match else None


def wrong_name(folder: Path, step: Any) -> str | None:
    """What is wrong with the name of a checkpoint's folder: that of another step than the one that is in it."""
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
    """Whether a path means one checkpoint, whole or damaged."""
    # The hash, not the manifest: data sets have a manifest.json too.
    return path.is_dir() and ((path / MANIFEST_HASH).is_file() or step_of_folder(path.resolve().name) is not None)


def folder_of_checkpoints(path: Path) -> Path | None:
    """The folder with the checkpoints of a run or an import, or a path that is it; None where there are none."""
    return next((folder for folder in (path / CHECKPOINTS, path) if checkpoint_steps(folder)), None)


def nearest_checkpoint(path: Path) -> Path | None:
    """What a path to a checkpoint may have meant: a run below it, or a checkpoint or a run beside or above it.

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
