"""What state.json of a checkpoint must hold before a run continues from it."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from llmtrain.checkpoint.reader import CheckpointReader
from llmtrain.errors import CheckpointError

Number = Annotated[int, Field(ge=0, le=10**18)]


class _Stored(BaseModel):
    """Sections may gain keys: those that are there must be what they were written as."""

    model_config = ConfigDict(strict=True, extra="allow")


class _History(_Stored):
    losses: Annotated[list[float], Field(max_length=1_000_000)] = []
    strikes: Number = 0


class _Train(_Stored):
    step: Number
    samples: Number
    tokens: Number
    data_tokens: Number = 0
    first_step_tokens: Number = 0
    history: _History = _History()


class _LossScale(_Stored):
    scale: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    good_steps: Number


class _Engine(_Stored):
    adam_steps: Number
    loss_scale: _LossScale | None


class _Position(_Stored):
    train: _Train


class _Whole(_Position):
    engine: _Engine


def require_state(checkpoint: CheckpointReader, engine_too: bool = False) -> None:
    """Raise CheckpointError where a checkpoint of a run lacks the position of that run, or what its engine counts.

    Imported weights have neither, and say so in the manifest: without that word, a run would begin anew in silence.
    """
    if not checkpoint.state and "imported" in checkpoint.about:
        return
    try:
        (_Whole if engine_too else _Position).model_validate(checkpoint.state)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        raise CheckpointError(
            f"{checkpoint.path}: state.json does not say how far the run is: {key}: {first['msg']}. "
            "Resume from another checkpoint, or copy this one again."
        ) from None
