"""The files of a Hugging Face folder: JSON, safetensors, and the hashes of an own export. Pickles are never read.

transformers reads weights, tokenizers and settings as they are: a changed byte gives other numbers or other text, in
silence. So an own export records the hashes of its files, and the tokenizers that its own was proved equal to. Nobody
writes weights and tokenizers by hand: changed ones are refused. Of changed settings it is said.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from llmtrain import files
from llmtrain.errors import ConfigError, DataError, ExportError
from llmtrain.files import open_regular

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
STORED_ENDS = ("_packed", "_scale", "_shape")
"""What stands behind the name of a weight in those of the tensors that a quantized one lies in."""
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_ROWS = 1024


@dataclass(frozen=True)
class Header:
    """The place of a tensor, and its type and shape as the file says."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]


RECORD_NAME = "llmtrain.json"
"""Of an own export: the hashes of its files."""

MARKS = {
    "hf": ("config.json", RECORD_NAME),
    "peft": ("adapter_config.json",),
    "adapterhub": ("adapter_config.json",),
    "gguf": ("*.gguf", RECORD_NAME),
    "onnx": ("onnx.json",),
    "torch-export": ("program.json",),
}
"""Files that every own export of a format has."""


def require_free(folder: Path, overwrite: bool, form: str) -> None:
    """Raise ConfigError where a folder holds something, unless it is an export of the format and may be replaced."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not overwrite:
        raise ConfigError(f"{folder}: exists already. Choose another name, remove it, or give --overwrite.")
    for mark in MARKS[form]:
        if not folder.is_dir() or not any(folder.glob(mark)):
            raise ConfigError(
                f"{folder}: is no export to {form} of llmtrain's (it has no {mark}), so --overwrite leaves it. Choose "
                "another name, or remove it yourself."
            )


@contextmanager
def written(out: Path) -> Iterator[Path]:
    """A folder to write into, that gets the name `out` when everything in it is there, in place of what has it.

    It lies beside it, under a name that nobody looks for. Nothing is left where anything fails. Raises ExportError
    where the file system refuses something.
    """
    target = out.resolve()
    writing = target.with_name(f".writing-{target.name}-{os.getpid()}")
    try:
        writing.mkdir(parents=True)
        yield writing
        replaced = target.with_name(f".replaced-{target.name}-{os.getpid()}")
        files.replace_folder(writing, target, replaced)
        shutil.rmtree(replaced, ignore_errors=True)
    except OSError as error:
        raise ExportError(f"{error.filename or out}: the export could not be written: {error.strerror}.") from error
    finally:
        shutil.rmtree(writing, ignore_errors=True)


def all_headers(folder: Path) -> dict[str, Header]:
    """The tensors of all files by their names. Raises ConfigError where there are none, DataError for damaged files."""
    return {name: header for file in _files(folder) for name, header in file_headers(file).items()}


def equal_tensors(one: Header, other: Header) -> bool:
    """True where two stored tensors have the same values; some rows of each are read at a time."""
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


def file_headers(file: Path) -> dict[str, Header]:
    """The tensors of a file by their names. Raises DataError where it is damaged."""
    try:
        with safe_open(file, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (safe_open is no mapping)
            return {
                name: Header(file, name, found.get_dtype(), tuple(found.get_shape())) for name, found in slices.items()
            }
    except (SafetensorError, OSError) as error:
        raise DataError(f"{file}: is no valid safetensors file: {error}. Copy it again.") from error


_SETTINGS = ("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "*.jinja")
_HASHED = ("*.safetensors", "*.safetensors.index.json", "tokenizer.json", "tokenizer.model", *_SETTINGS)


def write_record(folder: Path, equal_tokenizers: tuple[str, ...]) -> None:
    """Record the hashes of an export, and of the tokenizers that its own was proved equal to: data sets that were
    written with them stay usable."""
    paths = sorted(path for pattern in _HASHED for path in folder.glob(pattern))
    files = {path.name: sha256_of(path) for path in paths}
    own = files["tokenizer.json"]
    equal = [sha256 for sha256 in dict.fromkeys(equal_tokenizers) if sha256 != own]
    content = {"tokenizer_sha256": own, "equal_sha256": equal, "files": files}
    (folder / RECORD_NAME).write_text(json.dumps(content, indent=2) + "\n", "utf-8")


def require_as_exported(folder: Path) -> list[str]:
    """Raise DataError where weights or tokenizer of an own export are not what was written; returns what else is not.

    Other folders say nothing of their files.
    """
    record = folder / RECORD_NAME
    if not os.path.lexists(record):
        return []
    files = read_json(record).get("files", {})
    if not isinstance(files, dict):
        raise DataError(f"{record}: files must be an object. Export again, or remove this file.")
    changed = []
    for name, expected in files.items():
        path = folder / Path(name).name
        try:
            actual = f"actual {sha256_of(path)}"
        except OSError as error:
            actual = f"it cannot be read: {error.strerror}"
        if actual == f"actual {expected}":
            continue
        if any(fnmatch(path.name, pattern) for pattern in _SETTINGS):
            changed.append(f"{path}: was changed since the export, or is damaged")
            continue
        raise DataError(
            f"{path}: is not what was exported: expected sha256 {expected} as {RECORD_NAME} says, {actual}. Export "
            f"again; after a change on purpose, remove {record}."
        )
    return changed


def sha256_of(path: Path) -> str:
    """The sha256 of a regular file. Raises OSError."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
