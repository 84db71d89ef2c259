"""Records of texts with labels: the objects of JSON lines, or the rows of tables with a header, with file and line."""

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from data_pipelines.reading.inputs import ReadReport, find_files
from data_pipelines.reading.opened import OPENERS, Opened, opened_file
from llmtrain.errors import ConfigError, DataError
from llmtrain.files import parse_json

LONGEST_LINE = 1 << 26
DELIMITERS = {".csv": ",", ".tsv": "\t"}
"""Of tables. Everything else is JSON lines."""

NAMED_BY = "--text-key, --text-b-key and --label-key say what they are called."


@dataclass(frozen=True)
class LabelledRecord:
    """Values by key, and the place that errors name."""

    values: dict[str, Any]
    where: str

    def fault(self, text: str) -> DataError:
        return DataError(f"{self.where}: {text}")

    def value(self, key: str) -> Any:
        """Raises DataError where the record has no such key."""
        if self.values.get(key) is None:
            known = ", ".join(self.values) or "none"
            raise self.fault(f"has no {key}; its keys are {known}. {NAMED_BY}")
        return self.values[key]

    def text(self, key: str) -> str:
        """Raises DataError where it is no text, or an empty one."""
        value = self.value(key)
        if not isinstance(value, str):
            raise self.fault(f"{key} is {_kind(value)}, not a text.")
        if not value.strip():
            raise self.fault(f"{key} is empty. Leave the record out, or write what it says.")
        return value

    def words(self, key: str) -> list[str]:
        """A list of texts, or one whose words are apart by spaces. Raises DataError where it is neither."""
        value = self.value(key)
        found = value.split() if isinstance(value, str) else value
        if not isinstance(found, list) or not all(isinstance(word, str) and word.strip() for word in found):
            raise self.fault(f"{key} must be a list of texts, none of them empty, or one text with spaces between.")
        if not found:
            raise self.fault(f"{key} is empty. Leave the record out.")
        return found


def _kind(value: Any) -> str:
    return {bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}.get(
        type(value), repr(value)
    )


def iter_records(inputs: Sequence[str], report: ReadReport) -> Iterator[LabelledRecord]:
    """All records of all files, in their order. Raises ConfigError and DataError."""
    for file in find_files(inputs, report):
        report.files += 1
        suffixes = [suffix.lower() for suffix in PurePosixPath(file.location).suffixes]
        plain = suffixes[:-1] if suffixes and suffixes[-1] in OPENERS else suffixes
        delimiter = DELIMITERS.get(plain[-1]) if plain else None
        with opened_file(file, LONGEST_LINE) as opened:
            yield from _objects(opened, report) if delimiter is None else _rows(opened, report, delimiter)
    if not report.documents:
        raise ConfigError(f"{', '.join(inputs)}: there is no record in it. Give JSON lines, or a table with a header.")


def _objects(opened: Opened, report: ReadReport) -> Iterator[LabelledRecord]:
    for number, line in enumerate(opened.lines(), 1):
        where = f"{opened.path}:{number}"
        if line is None:
            raise DataError(f"{where}: has more than {LONGEST_LINE:,} bytes. A line is one record, as JSON.")
        if not line.strip():
            continue
        try:
            item = parse_json(line)
        except ValueError as error:
            raise DataError(
                f"{where}: not JSON ({error}). Each line is one record; tables end in .csv or .tsv."
            ) from None
        if not isinstance(item, dict):
            raise DataError(f"{where}: is {_kind(item)}, not an object. Each line is one record.")
        report.documents += 1
        report.text_bytes += len(line)
        yield LabelledRecord(item, where)


def _rows(opened: Opened, report: ReadReport, delimiter: str) -> Iterator[LabelledRecord]:
    """A row may have line breaks in quotes: it is named by its last line."""
    csv.field_size_limit(LONGEST_LINE)
    text = io.TextIOWrapper(opened.file, encoding="utf-8-sig", newline="")
    rows = csv.reader(text, delimiter=delimiter, strict=True)
    header: list[str] | None = None
    try:
        for row in rows:
            where = f"{opened.path}:{rows.line_num}"
            if not row:
                continue
            if header is None:
                header = _header(row, where)
                continue
            if len(row) != len(header):
                raise DataError(
                    f"{where}: has {len(row)} cells, and the header {len(header)}. Quote cells with {delimiter!r}."
                )
            report.documents += 1
            report.text_bytes += sum(map(len, row))
            yield LabelledRecord(dict(zip(header, row, strict=True)), where)
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{opened.path}:{rows.line_num + 1}: not a table in UTF-8 ({error}).") from None
    finally:
        text.detach()  # whoever has opened the file closes it


def _header(row: list[str], where: str) -> list[str]:
    twice = next((name for name in row if row.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"{where}: the header has {twice!r} twice. The first line names the columns.")
    return row
