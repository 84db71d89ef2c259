"""From where a run would continue, as the small files of checkpoints tell it. Opens no tensor and imports no torch."""

from dataclasses import dataclass

from llmtrain.checkpoint.folders import CHECKPOINTS, STATE
from llmtrain.checkpoint.origin import newest_origin
from llmtrain.config.budget import Budget, Seen, seen_by
from llmtrain.config.schema import RunConfig
from llmtrain.errors import CheckpointError
from llmtrain.files import read_json
from llmtrain.preflight.resume_rules import resume_target


@dataclass(frozen=True)
class Continuation:
    """The checkpoint that a run would continue, and the step it was saved after; 0 for imported weights.

    `data_tokens` is what was read up to there, `last_step` where the run would end now.
    `is_own` tells a checkpoint of the run itself from one of another run. Opening it may still find damage: then the
    one before it is taken.
    """

    checkpoint: str
    step: int
    is_own: bool
    data_tokens: int
    last_step: int


def damaged_checkpoints(config: RunConfig) -> list[str]:
    """What is wrong with the checkpoints that a run would pass over for an older one, as their small files tell."""
    target, damaged = resume_target(config), list[str]()
    if target is not None:
        newest_origin(target, damaged)
    return damaged


def find_continuation(config: RunConfig) -> Continuation | None:
    """None where the run begins at its first step, with nothing to begin from.

    Raises CheckpointError where the checkpoint does not say after which step it was saved.
    """
    target = resume_target(config)
    origin = newest_origin(target) if target is not None else None
    if origin is None:
        return None
    try:
        state = read_json(origin.path / STATE)
        seen = seen_by(state["train"], origin.config) if origin.trained else Seen()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{origin.path / STATE}: does not say how far training was: {error!r}") from error
    own = config.run_dir / CHECKPOINTS
    is_own, last_step = origin.path.resolve().parent == own.resolve(), Budget.of(config).last_step(seen)
    return Continuation(str(origin.path), seen.step, is_own, seen.data_tokens, last_step)
