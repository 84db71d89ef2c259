"""What an own export says of itself: hashes of the files that nobody writes by hand, and equal tokenizers.

transformers reads weights and tokenizers as they are: a changed byte gives other numbers or other text, in silence.
"""

import hashlib
import json
from pathlib import Path

from llmtrain.errors import DataError
from llmtrain.files import open_regular
from llmtrain.interop.weight_files import read_json

RECORD_NAME = "llmtrain.json"
_HASHED = ("*.safetensors", "*.safetensors.index.json", "tokenizer.json", "tokenizer.model")


def write_record(folder: Path, equal_tokenizers: tuple[str, ...]) -> None:
    """Record the hashes of an export, and of the tokenizers that its own was proved equal to: data sets that were
    written with them stay usable."""
    paths = sorted({path for pattern in _HASHED for path in folder.glob(pattern)})
    files = {path.name: _sha256(path) for path in paths}
    own = files["tokenizer.json"]
    equal = [sha256 for sha256 in dict.fromkeys(equal_tokenizers) if sha256 != own]
    content = {"tokenizer_sha256": own, "equal_sha256": equal, "files": files}
    (folder / RECORD_NAME).write_text(json.dumps(content, indent=2) + "\n", "utf-8")


def require_as_exported(folder: Path) -> None:
    """Raise DataError where a file of an own export is not what was written; other folders say nothing of theirs."""
    record = folder / RECORD_NAME
    if not record.exists() and not record.is_symlink():
        return
    files = read_json(record).get("files", {})
    if not isinstance(files, dict):
        raise DataError(f"{record}: files must be an object. Export again, or remove this file.")
    for name, expected in files.items():
        path = folder / Path(name).name
        try:
            actual = _sha256(path)
        except OSError as error:
            actual = f"{error.strerror}"
        if actual != expected:
            raise DataError(
                f"{path}: is not what was exported: expected sha256 {expected} as {RECORD_NAME} says, actual {actual}. "
                f"Export again; after a change on purpose, remove {record}."
            )


def _sha256(path: Path) -> str:
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
