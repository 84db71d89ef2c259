"""From where a run would continue, as the small files of checkpoints tell it. Opens no tensor and imports no torch."""

from dataclasses import dataclass
from pathlib import Path

from llmtrain.checkpoint.folders import CHECKPOINTS, STATE
from llmtrain.checkpoint.origin import newest_origin
from llmtrain.config.schema import RunConfig
from llmtrain.errors import CheckpointError
from llmtrain.files import read_json
from llmtrain.train.continuity import resume_target


@dataclass(frozen=True)
class Continuation:
    """The checkpoint that a run would continue, and the step it was saved after; 0 for imported weights.

    `is_own` tells a checkpoint of the run itself from one of another run. Opening it may still find damage: then the
    one before it is taken.
    """

    checkpoint: str
    step: int
    is_own: bool


def find_continuation(config: RunConfig) -> Continuation | None:
    """None where the run begins at its first step, with nothing to begin from.

    Raises CheckpointError where the checkpoint does not say after which step it was saved.
    """
    target = resume_target(config)
    origin = newest_origin(target) if target is not None else None
    if origin is None:
        return None
    try:
        step = int(read_json(origin.path / STATE)["train"]["step"]) if origin.trained else 0
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{origin.path / STATE}: does not say how far training was: {error!r}") from error
    own = Path(config.output_dir) / config.name / CHECKPOINTS
    return Continuation(str(origin.path), step, origin.path.resolve().parent == own.resolve())
