"""Reading documents from files as they lie about: plain text, JSON lines, folders and patterns."""

import glob
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from llmtrain.errors import ConfigError, DataError

NAMED_EXAMPLES = 2
"""How many of the files that were left out a summary names."""


@dataclass
class ReadReport:
    """What was read and what was left out, counted while documents are drawn."""

    files: int = 0
    documents: int = 0
    text_bytes: int = 0
    empty: int = 0
    not_utf8: int = 0
    examples: list[str] = field(default_factory=list)

    def leave_out(self, where: str) -> None:
        """Count something that is not UTF-8 text."""
        self.not_utf8 += 1
        if len(self.examples) < NAMED_EXAMPLES:
            self.examples.append(where)

    def summary(self) -> str:
        """One line for people."""
        text = f"read {self.documents:,} documents ({self.text_bytes / 1e6:,.1f} MB) from {self.files:,} files"
        if self.empty:
            text += f"; left out {self.empty:,} empty ones"
        if self.not_utf8:
            text += f"; left out {self.not_utf8:,} that are not UTF-8 text, such as {', '.join(self.examples)}"
        return text


def iter_documents(inputs: Sequence[str | Path], report: ReadReport, json_field: str = "text") -> Iterator[str]:
    """The documents of all inputs, in an order that depends only on names.

    An input is a file, a folder (every file below it, sorted) or a glob pattern. A `.jsonl` file holds one document
    per line in `json_field`; any other file is one document. Files that are not UTF-8 are left out and counted in
    `report`, as are empty documents. Raises ConfigError for an input that does not exist, DataError for a broken line.
    """
    for path in _files_of(inputs):
        report.files += 1
        for text in _read_jsonl(path, json_field, report) if path.suffix == ".jsonl" else _read_text(path, report):
            if not text:
                report.empty += 1
                continue
            report.documents += 1
            report.text_bytes += len(text.encode())
            yield text


def _files_of(inputs: Sequence[str | Path]) -> Iterator[Path]:
    # All inputs are looked at before the first is read: a misspelt last one should not cost an hour.
    found = [(str(name), _expand(str(name))) for name in inputs]
    for name, paths in found:
        if not paths:
            raise ConfigError(f"{name}: no such file, folder or pattern with files. Check the spelling.")
    for _, paths in found:
        yield from paths


def _expand(name: str) -> list[Path]:
    path = Path(name)
    if path.is_file():
        return [path]
    if path.is_dir():
        return sorted(_files_below(path))
    matches = [Path(match) for match in glob.glob(name, recursive=True)]  # noqa: PTH207  absolute patterns too
    return sorted(match for match in matches if match.is_file())


def _files_below(folder: Path) -> Iterable[Path]:
    for parent, _, names in os.walk(folder):  # does not follow links to folders, so it ends
        yield from (path for name in names if (path := Path(parent, name)).is_file())


def _read_text(path: Path, report: ReadReport) -> Iterator[str]:
    try:
        yield path.read_bytes().decode("utf-8-sig")  # bytes: line ends stay as they are
    except UnicodeDecodeError:
        report.leave_out(str(path))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}). Repair it or leave it out.") from None


def _read_jsonl(path: Path, json_field: str, report: ReadReport) -> Iterator[str]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                text = json.loads(line)[json_field]
                text.encode()  # JSON can spell half of a surrogate pair, which is no text
            except UnicodeError:
                report.leave_out(where)
                continue
            except json.JSONDecodeError as error:
                raise DataError(f"{where}: not JSON ({error}). Each line must be one JSON object.") from None
            except (KeyError, TypeError, AttributeError, RecursionError):
                raise DataError(
                    f"{where}: must be an object whose key {json_field!r} holds text; --field names it."
                ) from None
            yield text
