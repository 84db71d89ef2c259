"""What a checkpoint was trained with, by its small files alone. Imports no torch: it is asked before a run starts."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
from llmtrain.checkpoint.stored_state import require_position
from llmtrain.config.reading.document import load_plain
from llmtrain.errors import CheckpointError
from llmtrain.files import parse_json, read_bytes, read_text


@dataclass(frozen=True)
class Origin:
    """Where a checkpoint comes from. `config` is the resolved configuration of the run that saved it, as plain data.

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
    require_position(path, state)
    try:
        config = load_plain(config_text)
    except ValueError as error:
        raise CheckpointError(f"{path / CONFIG}: is no YAML: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path / CONFIG}: is no configuration of a run")
    return Origin(path, "train" in state, config, about, state)


def read_origin(path: Path) -> Origin:
    """The origin of a checkpoint folder; of its files only the small ones are read and hashed.

    Raises CheckpointError where they are damaged. Whether the tensors are whole, only opening the checkpoint tells.
    """
    try:
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
