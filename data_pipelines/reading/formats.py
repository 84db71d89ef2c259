"""The formats of inputs: by which endings they are known, how they are read and how a large file is divided."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal

from data_pipelines.reading.archives import read_tar, read_warc
from data_pipelines.reading.inputs import InputFile, ReadReport
from data_pipelines.reading.json_text import read_json, read_json_lines
from data_pipelines.reading.opened import LONGEST_DOCUMENT, OPENERS, FileSpan, opened_file
from data_pipelines.reading.plain_text import read_html, read_text
from data_pipelines.reading.records import Reader, ReadOptions, Record
from data_pipelines.reading.tables import read_arrow, read_parquet
from llmtrain.config.pipelines.schema import FormatName
from llmtrain.errors import ConfigError


@dataclass(frozen=True)
class FileFormat:
    """One row. `divided`: a file that is not packed can be read in spans that begin behind line ends, behind the
    separator, or at groups of rows."""

    suffixes: tuple[str, ...]
    read: Reader
    divided: Literal["lines", "parts", "groups"] | None = None
    package: str | None = None
    """What has to be installed."""
    packed: bool = True
    """May be compressed as a whole."""


FORMATS: dict[FormatName, FileFormat] = {
    "text": FileFormat((), read_text, "parts"),
    "jsonl": FileFormat((".jsonl", ".ndjson"), read_json_lines, "lines"),
    "json": FileFormat((".json",), read_json),
    "html": FileFormat((), read_html),
    "parquet": FileFormat((".parquet",), read_parquet, "groups", "pyarrow", packed=False),
    "arrow": FileFormat((".arrow",), read_arrow, None, "pyarrow", packed=False),
    "webdataset": FileFormat((".tar",), read_tar),
    "warc": FileFormat((".warc",), read_warc, None, "fastwarc"),
}
"""`html` has no endings: where nothing else is asked for, the source of a page is plain text as that of a program."""

ARCHIVES = (".tgz", ".tbz2", ".txz", ".zip", ".7z", ".rar", ".feather", ".npz", ".npy")
"""Endings of what is not read."""


def format_of(location: str) -> FormatName | None:
    """The format that a file's name tells; None for an archive that is not read."""
    suffixes = [suffix.lower() for suffix in PurePosixPath(location).suffixes]
    if suffixes and suffixes[-1] in ARCHIVES:
        return None
    kind = suffixes[:-1] if suffixes and suffixes[-1] in OPENERS else suffixes
    if kind and kind[-1] in ARCHIVES:
        return None
    for name, row in FORMATS.items():
        if kind and kind[-1] in row.suffixes:
            return name
    return "text"


def is_packed(location: str) -> bool:
    """True for a name that says that the file is compressed."""
    return PurePosixPath(location).suffix.lower() in OPENERS


def iter_records(
    source: InputFile,
    report: ReadReport,
    options: ReadOptions,
    name: FormatName | None = None,
    span: FileSpan | None = None,
    longest: int = LONGEST_DOCUMENT,
) -> Iterator[Record]:
    """The documents of a file, or of a span of it. What is left out is counted in `report`.

    Raises ConfigError where the user named something that is not read, DataError for what is broken.
    """
    name = name or format_of(source.location)
    if name is None or (is_packed(source.location) and not FORMATS[name].packed):
        if source.named:
            message = f"{source.name}: is an archive or a packed table. Unpack it, or write its texts as .jsonl."
            raise ConfigError(message)
        report.leave_out("archive", source.name)
        return
    row = FORMATS[name]
    with opened_file(source, longest, span, row.divided == "groups") as opened:
        yield from row.read(opened, report, options)
