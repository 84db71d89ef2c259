"""What an own export says of itself: the hashes of its files, and which tokenizers its own was proved equal to.

transformers reads weights, tokenizers and settings as they are: a changed byte gives other numbers or other text, in
silence. Nobody writes weights and tokenizers by hand: changed ones are refused. Of settings it is said.
"""

import hashlib
import json
import os
from fnmatch import fnmatch
from pathlib import Path

from llmtrain.errors import DataError
from llmtrain.files import open_regular
from llmtrain.interop.weight_files import read_json

RECORD_NAME = "llmtrain.json"
_SETTINGS = ("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "*.jinja")
_HASHED = ("*.safetensors", "*.safetensors.index.json", "tokenizer.json", "tokenizer.model", *_SETTINGS)


def write_record(folder: Path, equal_tokenizers: tuple[str, ...]) -> None:
    """Record the hashes of an export, and of the tokenizers that its own was proved equal to: data sets that were
    written with them stay usable."""
    paths = sorted(path for pattern in _HASHED for path in folder.glob(pattern))
    files = {path.name: _sha256(path) for path in paths}
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
            actual = f"actual {_sha256(path)}"
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


def _sha256(path: Path) -> str:
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
