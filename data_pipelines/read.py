"""Reading documents from files as they lie about: plain text, JSON lines, JSON, each of them compressed or not.

What a file is, its name says, in capitals or not; docs/concepts.md has the table.
"""

import bz2
import codecs
import gzip
import json
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO, Any, cast

from data_pipelines.inputs import InputFile, ReadReport, find_files
from llmtrain.errors import ConfigError, DataError

JSON_LINES = (".jsonl", ".ndjson")
ARCHIVES = (".tar", ".tgz", ".tbz2", ".txz", ".zip", ".7z", ".rar", ".parquet", ".arrow", ".feather")
LONGEST_DOCUMENT = 1 << 30
"""Bytes of a document, of a line, or of a .json file: each is in memory as a whole."""

_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class ReadOptions:
    """`json_field` is the key of a document's text in JSON; `separator` cuts plain text into documents."""

    json_field: str = "text"
    separator: str | None = None


@dataclass(frozen=True)
class _Opened:
    """A file that is being read: `file` gives its bytes unpacked; `named` as in InputFile."""

    file: IO[bytes]
    path: Path
    named: bool


def iter_documents(
    inputs: Sequence[str | Path], report: ReadReport, options: ReadOptions | None = None
) -> Iterator[str]:
    """The documents of all inputs, in an order that depends only on names.

    An input is a file, a folder or a glob pattern. What is left out is counted in `report`. Raises ConfigError for an
    input that does not exist or cannot be read as text, and where there is not one document; DataError for a broken
    line or file.
    """
    options = options or ReadOptions()
    for file in find_files(inputs, report):
        report.files += 1
        for text in _documents_of(file, report, options):
            if not text:
                report.leave_out("empty", file.path)
                continue
            report.documents += 1
            report.text_bytes += len(text.encode())
            yield text
    if not report.documents:
        raise ConfigError(f"{', '.join(map(str, inputs))}: no text in it: {report.summary()}.")


def _documents_of(file: InputFile, report: ReadReport, options: ReadOptions) -> Iterator[str]:
    suffixes = tuple(suffix.lower() for suffix in file.path.suffixes)
    opener = _OPENERS.get(suffixes[-1] if suffixes else "")
    kinds = suffixes[:-1] if opener else suffixes
    kind = kinds[-1] if kinds else ""
    if kind in ARCHIVES or (suffixes and suffixes[-1] in ARCHIVES):
        if file.named:
            raise ConfigError(f"{file.path}: is an archive or a table. Unpack it, or write its texts as .jsonl.")
        report.leave_out("archive", file.path)
        return
    reader = _read_json_lines if kind in JSON_LINES else _read_json if kind == ".json" else _read_text
    try:
        with (opener or _open_plain)(file.path) as unpacked:
            yield from reader(_Opened(unpacked, file.path, file.named), report, options)
    except (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{file.path}: cannot be unpacked: {error}. Copy it again or leave it out.") from None
    except MemoryError:
        raise DataError(f"{file.path}: there is too little memory for a document of it. {_SMALLER}") from None
    except OSError as error:
        raise DataError(
            f"{file.path}: cannot be read ({error.strerror or error}). Repair it or leave it out."
        ) from None


def _open_plain(path: Path) -> IO[bytes]:
    return path.open("rb")


def _open_zstd(path: Path) -> IO[bytes]:
    try:
        from backports import zstd  # compression.zstd of Python 3.14
    except ImportError:
        raise ConfigError(
            f"{path}: reading zstd needs the package backports-zstd. Install it, or unpack the file with `zstd -d`."
        ) from None

    class Whole(zstd.ZstdFile):
        """Raises EOFError, which the reader knows, in place of the library's own error."""

        def read(self, size: int | None = -1) -> bytes:
            try:
                return super().read(size)
            except zstd.ZstdError as error:
                raise EOFError(error) from None

        def readline(self, size: int | None = -1) -> bytes:
            try:
                return super().readline(size)
            except zstd.ZstdError as error:
                raise EOFError(error) from None

    return cast(IO[bytes], Whole(path))


_OPENERS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.GzipFile,
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    ".zst": _open_zstd,
}


def _read_text(opened: _Opened, report: ReadReport, options: ReadOptions) -> Iterator[str]:
    if options.separator:
        yield from _read_parts(opened, report, options.separator)
        return
    try:
        yield _whole(opened).decode("utf-8-sig")  # bytes: line ends stay as they are
    except UnicodeDecodeError:
        report.leave_out("not_text", opened.path)


def _read_parts(opened: _Opened, report: ReadReport, separator: str) -> Iterator[str]:
    """The texts between separators, without holding the file."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    pending: list[str] = []
    end, given, length = "", 0, 0
    while True:
        block = opened.file.read(_BLOCK_BYTES)
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError:
            if given:
                message = f"{opened.path}: is not UTF-8 text behind its part {given}. Repair it or leave it out."
                raise DataError(message) from None
            report.leave_out("not_text", opened.path)
            return
        # Only the last characters of what is pending may belong to a separator that this block goes on with.
        first, *others = (end + text).split(separator)
        if others:
            yield "".join(pending) + first
            yield from others[:-1]
            given += len(others)
            pending, first = [], others[-1]
        if not block:
            yield "".join(pending) + first
            return
        keep = max(0, len(first) - len(separator) + 1)
        pending.append(first[:keep])
        end = first[keep:]
        length = length + keep if not others else keep
        if length > LONGEST_DOCUMENT:
            raise _too_long(opened.path)


def _whole(opened: _Opened) -> bytes:
    """The rest of a file. Raises DataError where it is too long for one document."""
    content = opened.file.read(LONGEST_DOCUMENT + 1)
    if len(content) > LONGEST_DOCUMENT:
        raise _too_long(opened.path)
    return content


def _lines(opened: _Opened) -> Iterator[bytes]:
    """The lines that are left of a file. Raises DataError for one that is too long."""
    while line := opened.file.readline(LONGEST_DOCUMENT + 1):
        if len(line) > LONGEST_DOCUMENT:
            raise _too_long(opened.path)
        yield line


def _too_long(path: Path) -> DataError:
    return DataError(f"{path}: a document or line of it has more than {LONGEST_DOCUMENT:,} bytes. {_SMALLER}")


_SMALLER = (
    "Cut the file into documents: plain text with --separator, such as an empty line, JSON as .jsonl with an object "
    "in each line."
)


def _read_json_lines(opened: _Opened, report: ReadReport, options: ReadOptions) -> Iterator[str]:
    yield from _texts_of_lines(_lines(opened), opened, report, options)


def _texts_of_lines(lines: Iterable[bytes], opened: _Opened, report: ReadReport, options: ReadOptions) -> Iterator[str]:
    key = options.json_field
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{opened.path}:{number}"
        try:
            text = json.loads(line)[key]
            text.encode()  # JSON can spell half of a surrogate pair, which is no text
        except UnicodeError:
            report.leave_out("not_text", where)
            continue
        except ValueError as error:  # not JSON, or a number of thousands of digits
            raise DataError(f"{where}: not JSON ({error}). Each line must be one JSON object.") from None
        except (KeyError, TypeError, AttributeError, RecursionError):
            raise DataError(f"{where}: must be an object whose key {key!r} holds text; --field names it.") from None
        yield text


def _read_json(opened: _Opened, report: ReadReport, options: ReadOptions) -> Iterator[str]:
    """An object with text, a list of such objects, or JSON lines under another name, as many data sets have them."""
    first = next(_lines(opened), b"")
    second = next(_lines(opened), b"") if isinstance(_parsed(first), dict) else b""
    if second.strip() and isinstance(_parsed(second), dict):
        lines = chain((first, second), _lines(opened))
        yield from _texts_of_lines(lines, opened, report, options)
        return
    value = _parsed(first + second + _whole(opened))
    items = value if isinstance(value, list) else [value]
    texts = [item.get(options.json_field) if isinstance(item, dict) else None for item in items]
    if not texts or not all(isinstance(text, str) for text in texts):
        if opened.named:
            raise DataError(_json_advice(opened.path, value, options.json_field))
        report.leave_out("no_field", opened.path)
        return
    for text in map(str, texts):
        try:
            text.encode()
        except UnicodeError:
            report.leave_out("not_text", opened.path)
            continue
        yield text


def _parsed(content: bytes) -> Any:
    """The value of a JSON text, or the error that says why there is none."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        return error


def _json_advice(path: Path, value: Any, json_field: str) -> str:
    why = f"is not JSON ({value})" if isinstance(value, Exception) else "holds something else"
    return (
        f"{path}: {why}. A .json file must be an object whose key {json_field!r} holds text (--field names it), or a "
        "list of such objects. Name it .jsonl where each line is an object, .txt to take it as plain text."
    )
