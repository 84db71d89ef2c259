"""The safetensors files of a Hugging Face folder: which there are and what is in them. Pickles are never read."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from llmtrain import files
from llmtrain.errors import ConfigError, DataError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_ROWS = 1024


@dataclass(frozen=True)
class Header:
    """Where a tensor lies, and its type and shape as the file says."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]


def all_headers(folder: Path) -> dict[str, Header]:
    """The tensors of all files by their names. Raises ConfigError where there are none, DataError for damaged files."""
    return {name: header for file in _files(folder) for name, header in _headers(file).items()}


def equal_tensors(one: Header, other: Header) -> bool:
    """Whether two stored tensors have the same values; some rows of each are read at a time."""
    if one.shape != other.shape:
        return False
    with safe_open(one.file, framework="pt") as first, safe_open(other.file, framework="pt") as second:
        rows, other_rows = first.get_slice(one.name), second.get_slice(other.name)
        starts = range(0, one.shape[0], _ROWS)
        return all(torch.equal(rows[at : at + _ROWS], other_rows[at : at + _ROWS]) for at in starts)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises DataError for anything else."""
    try:
        content = files.read_json(path)
    except ValueError as error:
        raise DataError(f"{path}: is no valid JSON: {error}") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: must be a JSON object")
    return content


def _files(folder: Path) -> list[Path]:
    if (folder / INDEX).is_file():
        weight_map = read_json(folder / INDEX).get("weight_map")
        named = list(weight_map.values()) if isinstance(weight_map, dict) else []
        foreign = [name for name in named if not isinstance(name, str) or Path(name).name != name or "\0" in name]
        names = [] if foreign else sorted(set(named))
        if foreign or not names:
            raise DataError(
                f"{folder / INDEX}: weight_map must name files of the same folder; it names {str(foreign)[:200]}"
            )
        if missing := [name for name in names if not (folder / name).is_file()]:
            raise DataError(f"{folder}: {', '.join(missing)} is missing; {INDEX} lists it. Copy the folder again.")
        return [folder / name for name in names]
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if pickles := sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern)):
        raise ConfigError(
            f"{folder}: has its weights as {', '.join(pickles)}. Such files are pickles, which can run any code when "
            "they are read, so llmtrain reads none. Where you trust it, convert it: load it with transformers and "
            "`model.save_pretrained(FOLDER)`, which writes safetensors."
        )
    raise ConfigError(f"{folder}: holds neither {WEIGHTS} nor {INDEX}.")


def _headers(file: Path) -> dict[str, Header]:
    try:
        with safe_open(file, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (safe_open is no mapping)
            return {
                name: Header(file, name, found.get_dtype(), tuple(found.get_shape())) for name, found in slices.items()
            }
    except (SafetensorError, OSError) as error:
        raise DataError(f"{file}: is no valid safetensors file: {error}. Copy it again.") from error
