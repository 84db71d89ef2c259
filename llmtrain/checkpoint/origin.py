"""The configuration and position that a checkpoint comes from, by its small files alone. Imports no torch."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError

from llmtrain.checkpoint.folders import (
    CONFIG,
    LONGEST_MANIFEST,
    MANIFEST,
    MANIFEST_HASH,
    STATE,
    checkpoint_steps,
    is_checkpoint,
    step_folder_name,
    wrong_name,
)
from llmtrain.config.reading.document import load_plain
from llmtrain.errors import CheckpointError
from llmtrain.files import parse_json, read_bytes, read_text

Number = Annotated[int, Field(ge=0, le=10**18)]


class _Stored(BaseModel):
    """Sections may gain keys: those that are there must be what they were written as."""

    model_config = ConfigDict(strict=True, extra="allow")


class _History(_Stored):
    losses: Annotated[list[float], Field(max_length=1_000_000)] = []
    strikes: Number = 0


class _Patience(_Stored):
    value: Annotated[float, Field(allow_inf_nan=False)] | None = Field(
        default=None, validation_alias=AliasChoices("value", "loss")
    )
    """Older checkpoints, of runs that could go by nothing else, name the loss."""
    step: Number = 0
    evaluations: Number = 0
    measured_on: str | None = None


class _Train(_Stored):
    step: Number
    samples: Number
    tokens: Number
    data_tokens: Number = 0
    first_step_tokens: Number = 0
    skipped_in_row: Number = 0
    history: _History = _History()
    patience: _Patience = _Patience()


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


@dataclass(frozen=True)
class Origin:
    """The source of a checkpoint. `config` is the resolved configuration of the run that saved it, as plain data.

    `trained` is False for imported weights, which have an architecture but no training behind them. `about` is what
    the manifest says beside that, `state` what it holds beside tensors.
    """

    path: Path
    trained: bool
    config: Mapping[str, Any]
    about: Mapping[str, Any]
    state: Mapping[str, Any]

    def section(self, name: str) -> dict[str, Any]:
        """A section of the configuration, empty where it has none."""
        found = self.config.get(name)
        return dict(found) if isinstance(found, dict) else {}


def origin_of(path: Path, state: Mapping[str, Any], config_text: str, about: Mapping[str, Any]) -> Origin:
    """The origin of a checkpoint that has been read. Raises CheckpointError where its configuration is none."""
    _require(_Maybe, path, state)
    try:
        config = load_plain(config_text)
    except ValueError as error:
        raise CheckpointError(f"{path / CONFIG}: is not YAML: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path / CONFIG}: is not a configuration of a run")
    return Origin(path, "train" in state, config, about, state)


def read_origin(path: Path) -> Origin:
    """The origin of a checkpoint folder; of its files only the small ones are read and hashed.

    Raises CheckpointError where they are damaged. Whether the tensors are whole, only opening the checkpoint tells.
    """
    try:
        # Hashed before it is parsed, as everything below: what a crash has torn may parse, and say something else.
        content = read_bytes(path / MANIFEST, LONGEST_MANIFEST)
        told = read_text(path / MANIFEST_HASH).split()[:1]
        if [hashlib.sha256(content).hexdigest()] != told:
            raise CheckpointError(f"{path / MANIFEST}: its sha256 is not the one that {MANIFEST_HASH} says")
        manifest = parse_json(content)
        if fault := wrong_name(path, manifest["step"]):
            raise CheckpointError(fault)
        texts = {name: read_bytes(path / name) for name in (CONFIG, STATE)}
        for name, text in texts.items():
            if hashlib.sha256(text).hexdigest() != manifest["files"][name]["sha256"]:
                raise CheckpointError(f"{path / name}: its sha256 is not the one that {MANIFEST} says")
        return origin_of(path, parse_json(texts[STATE]), texts[CONFIG].decode(), manifest["about"])
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error


def newest_origin(target: Path, damaged: list[str] | None = None) -> Origin | None:
    """The origin of a checkpoint, or of the newest one in a folder of checkpoints whose small files are whole.

    None where there is none: what that means is decided when it is opened. What is wrong with newer ones is appended to
    `damaged`.
    """
    found = (
        [target] if is_checkpoint(target) else [target / step_folder_name(step) for step in checkpoint_steps(target)]
    )
    for path in found:
        try:
            return read_origin(path)
        except CheckpointError as error:
            if damaged is not None:
                damaged.append(str(error))
    return None
