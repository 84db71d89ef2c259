"""From a path that a user gives to the checkpoint that it means."""

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from llmtrain.checkpoint.folders import (
    BEST_BY,
    CHECKPOINTS,
    MANIFEST,
    best_of,
    checkpoint_steps,
    folder_of_checkpoints,
    is_checkpoint,
    nearest_checkpoint,
    step_folder_name,
)
from llmtrain.checkpoint.manifest import CheckpointUnusableError, load_manifest
from llmtrain.checkpoint.reader import CheckpointReader, open_checkpoint
from llmtrain.config.metrics import row_of_metric
from llmtrain.errors import CheckpointError, ConfigError

_logger = logging.getLogger(__name__)


def checkpoint_folders(path: Path) -> list[Path]:
    """The checkpoints that a path means, oldest first: itself, or those of a run. Raises ConfigError for none."""
    if not path.is_dir():
        raise ConfigError(f"{path}: is not a folder. Give a run folder or a checkpoint folder.")
    if is_checkpoint(path):
        return [path]
    parent = folder_of_checkpoints(path)
    if parent is None:
        raise ConfigError(f"{path}: holds no checkpoint. Give a run folder with checkpoints/step-... in it.")
    return [parent / step_folder_name(step) for step in reversed(checkpoint_steps(parent))]


def open_newest(path: Path) -> CheckpointReader:
    """The checkpoint at a path, or the newest one of the run at a path; every file is hashed, none is passed over."""
    return open_checkpoint(checkpoint_folders(path)[-1])


def find_checkpoint(path: Path, also: Sequence[str] = (), moved_base: Path | None = None) -> CheckpointReader:
    """The checkpoint at a path, or the newest valid one of the run at a path; every file is hashed.

    `also` are other kinds of folders that could have been given, for the error; `moved_base` is as in
    `open_checkpoint`. Raises ConfigError where there is
    neither, CheckpointError where it is damaged.
    """
    if is_checkpoint(path):
        return open_checkpoint(path, moved_base=moved_base)
    folder = folder_of_checkpoints(path)
    newest = find_newest_valid(folder, _logger.warning, moved_base=moved_base)[0] if folder else None
    if newest is not None:
        return newest
    kinds = [
        f"a checkpoint (a folder with {MANIFEST})",
        f"a run with one (a folder with {CHECKPOINTS}/)",
        *also,
    ]
    near = nearest_checkpoint(path) or "a run folder such as runs/NAME, or runs/NAME/checkpoints/step-00000050"
    if not path.exists():
        what = f"no such folder. Looked from {Path.cwd()}. What is taken is {' or '.join(kinds)}"
    elif not path.is_dir():
        what = f"is a file. What is taken is {' or '.join(kinds)}"
    else:
        what = f"is neither {' nor '.join(kinds)}"
    raise ConfigError(f"{path}: {what}. Try {near}.")


def best_checkpoint(run: Path) -> Path:
    """The best checkpoint by evaluate.metric of the run at a path, by the manifests.

    Only values that were measured as the newest one are compared. Raises ConfigError where there is none.
    """
    folder = None if is_checkpoint(run) else folder_of_checkpoints(run)
    if folder is None:
        raise ConfigError(f"{run}: --best chooses one of a run's checkpoints, and this holds none. Give a run folder.")
    abouts = {}
    for step in checkpoint_steps(folder):
        with suppress(CheckpointError):  # what is damaged is not the best; who takes it would say so
            abouts[step] = load_manifest(folder / step_folder_name(step)).about
    measured = {step: about for step, about in abouts.items() if isinstance(about.get("metric"), int | float)}
    newest = measured[max(measured)] if measured else {}
    row, on = row_of_metric(newest.get(BEST_BY, "loss")), newest.get("evaluated_on")
    compared = {step: about["metric"] for step, about in measured.items() if about.get("evaluated_on") == on}
    best = best_of(compared, row.rises) if row else None
    if best is None:
        raise ConfigError(
            f"{run}: no checkpoint was measured by a metric that is known, so none is the best. Name one of them, or "
            "train with evaluate.every_steps and checkpoint.keep_best=true."
        )
    return folder / step_folder_name(best[0])


def find_newest_valid(
    checkpoints: Path,
    warn: Callable[[str], object],
    before_step: int | None = None,
    moved_base: Path | None = None,
) -> tuple[CheckpointReader | None, list[tuple[Path, CheckpointError]]]:
    """The newest checkpoint that is whole, and the damaged ones that were passed over. Changes nothing.

    With `before_step`, of those before that step; `moved_base` is as in `open_checkpoint`.

    None only for a folder without checkpoints. Raises CheckpointError where there are some and none is valid: a run
    must not start again from nothing by itself. CheckpointUnusableError (a newer format, no permission) is
    raised at once: such a checkpoint is not damaged.
    """
    damaged: list[tuple[Path, CheckpointError]] = []
    for step in checkpoint_steps(checkpoints):
        if before_step is not None and step >= before_step:
            continue
        path = checkpoints / step_folder_name(step)
        try:
            return open_checkpoint(path, moved_base=moved_base), damaged
        except CheckpointUnusableError:
            raise  # to go on from an older one would throw away training that is whole
        except CheckpointError as error:
            warn(f"{error}\nIt is passed over for an older one.")
            damaged.append((path, error))
    if damaged:
        raise CheckpointError(
            f"{checkpoints}: none of the {len(damaged)} checkpoints is valid. The newest: {damaged[0][1]}\n"
            "Remove the folder to train again from the beginning."
        )
    return None, []
