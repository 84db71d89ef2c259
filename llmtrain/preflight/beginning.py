"""The checkpoint that a run goes on from: its own, another run's, or the base of a finetuning. Imports no torch."""

from dataclasses import replace
from pathlib import Path

from llmtrain.checkpoint.folders import CHECKPOINTS, checkpoint_steps, folder_of_checkpoints, is_checkpoint
from llmtrain.checkpoint.origin import Origin, newest_origin
from llmtrain.config.schema import RunConfig


def resume_target(config: RunConfig) -> Path | None:
    """The checkpoint that the run would continue, or a folder whose newest valid one is meant; None for neither.

    `checkpoint.resume` is auto, none, or the path of a checkpoint, of a run or of an import. A path inside this run
    goes back to it; one outside is where the run begins, until it has checkpoints of its own. So is `finetune.base`.
    """
    resume = config.checkpoint.resume
    if resume == "none":
        return _base(config)
    run_dir = config.run_dir
    own = run_dir / CHECKPOINTS
    path = Path(resume)
    inside = resume != "auto" and path.resolve().is_relative_to(run_dir.resolve())
    newest = resume == "auto" or path.resolve() in (run_dir.resolve(), own.resolve())
    if newest and not checkpoint_steps(own):
        return _base(config) or own
    if newest or (checkpoint_steps(own) and not inside):
        return own
    return checkpoints_of(path)


def _base(config: RunConfig) -> Path | None:
    base = config.finetune.base if config.finetune else None
    return None if base is None else checkpoints_of(Path(base))


def checkpoints_of(path: Path) -> Path:
    """The checkpoint at a path, or the folder of the checkpoints of a run or an import there."""
    return path if is_checkpoint(path) else folder_of_checkpoints(path) or path


def begins_at_base(config: RunConfig) -> bool:
    """True where the run takes the weights of finetune.base, and nothing else of it."""
    base = _base(config)
    if base is None or base.resolve().is_relative_to(config.run_dir.resolve()):
        return False
    return resume_target(config) == base and config.checkpoint.resume in ("auto", "none")


def is_elsewhere(config: RunConfig) -> bool:
    """True where the run would continue a checkpoint that is not its own: another name would change nothing."""
    target = resume_target(config)
    return target is not None and not target.resolve().is_relative_to((config.run_dir).resolve())


def run_origin(config: RunConfig, damaged: list[str] | None = None) -> Origin | None:
    """The origin of what the run goes on from, by small files alone; None where there is nothing.

    Of a base only the weights count: what it was trained for is none of this run's training. What is wrong with newer
    checkpoints of a folder is appended to `damaged`.
    """
    target = resume_target(config)
    origin = newest_origin(target, damaged) if target is not None else None
    return replace(origin, trained=False) if origin is not None and begins_at_base(config) else origin
