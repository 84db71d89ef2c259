"""The files that steps read: lists with an entry in each line, and the texts of evaluation sets.

A line that cannot be used is an error with its place: a list that is read in part would let through what it names.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from llmtrain.errors import ConfigError, DataError
from llmtrain.files import parse_json, read_bytes

Entry = TypeVar("Entry")

LARGEST_FILE = 1 << 30
"""Bytes. What is made of a file takes several times as much memory in each process."""

_JSON_LINES = (".jsonl", ".ndjson")
_PARAGRAPH_ENDS = re.compile(r"\n[ \t\r]*\n")


def read_entries(files: Sequence[str], parse: Callable[[str], Entry | None], wanted: str) -> list[Entry]:
    """What `parse` makes of each line of the files that is neither empty nor begins with #.

    Raises ConfigError for a file that is not there or has no entry, DataError for one that is not UTF-8 and for a line
    of which `parse` makes nothing: it is not what is `wanted`.
    """
    entries: list[Entry] = []
    for file in files:
        before = len(entries)
        for number, line in enumerate(_text(file).split("\n"), 1):
            if not (line := line.strip()) or line.startswith("#"):
                continue
            if not (entry := parse(line)):
                raise DataError(
                    f"{file}:{number}: {line[:100]!r} is not {wanted}. Correct the line, or put # before it."
                )
            entries.append(entry)
        if len(entries) == before:
            raise ConfigError(f"{file}: has no entry. Each line must be {wanted}.")
    return entries


def iter_texts(file: str, fields: Sequence[str]) -> Iterator[str]:
    """The texts of an evaluation set: paragraphs of plain text; in JSON, what stands under the keys `fields`.

    The keys count at any depth; without any, all texts do. Raises ConfigError for a file that is not there or has no
    such text, DataError for one that is not UTF-8 or not JSON.
    """
    suffix = Path(file).suffix.lower()
    texts: Iterator[str]
    if suffix in _JSON_LINES:
        lines = enumerate(_text(file).split("\n"), 1)
        values = (_parsed(line, f"{file}:{number}") for number, line in lines if line.strip())
        texts = (text for value in values for text in _strings(value, fields, not fields))
    elif suffix == ".json":
        texts = _strings(_parsed(_text(file), file), fields, not fields)
    else:
        texts = iter(_PARAGRAPH_ENDS.split(_text(file)))
    found = False
    for text in texts:
        found = found or bool(text.strip())
        yield text
    if not found:
        raise ConfigError(f"{file}: has no text{' under the keys ' * bool(fields)}{', '.join(fields)}.")


def _text(file: str) -> str:
    try:
        return read_bytes(Path(file), LARGEST_FILE).decode("utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{file}: no such file. Check the spelling.") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        message = f"{file}:{line}: is not UTF-8 text. Unpack the file if it is packed, or convert it."
        raise DataError(message) from None


def _parsed(content: str, where: str) -> Any:
    try:
        return parse_json(content)
    except ValueError as error:
        raise DataError(f"{where}: not JSON ({error}). Repair it, or name the file .txt to take it as text.") from None


def _strings(value: Any, fields: Sequence[str], counts: bool) -> Iterator[str]:
    """The texts in a JSON value. `counts`: it stands under one of the keys, or there are none."""
    if isinstance(value, str):
        if counts:
            yield value
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner, fields, counts)
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _strings(inner, fields, counts or key in fields)
