"""What state.json of a checkpoint must hold before a run continues from it. Imports no torch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError

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
    skipped_in_row: Number = 0
    history: _History = _History()


class _LossScale(_Stored):
    scale: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    good_steps: Number


class _Engine(_Stored):
    updates: Number = Field(validation_alias=AliasChoices("updates", "adam_steps"))
    """Older checkpoints, of runs that could have no other optimizer, name Adam."""
    loss_scale: _LossScale | None


class _Position(_Stored):
    train: _Train


class _Maybe(_Stored):
    train: _Train | None = None


class _Whole(_Position):
    engine: _Engine


def require_state(path: Path, state: Mapping[str, Any], about: Mapping[str, Any], engine_too: bool = False) -> None:
    """Raise CheckpointError where the checkpoint of a run lacks that run's position, or what its engine counts.

    Imported weights have neither, and say so in the manifest: without that word, a run would begin anew in silence.
    """
    if not state and "imported" in about:
        return
    _require(_Whole if engine_too else _Position, path, state)


def require_position(path: Path, state: object) -> None:
    """Raise CheckpointError where a state has a position that is none."""
    _require(_Maybe, path, state)


def _require(form: type[_Stored], path: Path, state: object) -> None:
    try:
        form.model_validate(state)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        raise CheckpointError(
            f"{path}: state.json does not say how far the run is: {key}: {first['msg']}. "
            "Resume from another checkpoint, or copy this one again."
        ) from None


def updates_of(engine: Mapping[str, Any]) -> int:
    """How often the optimizer has stepped, from the engine's part of a checkpoint's state."""
    return engine["updates"] if "updates" in engine else engine["adam_steps"]
