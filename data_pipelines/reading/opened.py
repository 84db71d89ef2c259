"""A file that is being read: unpacked as it is read, of bounded documents, lines and growth."""

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

from data_pipelines.reading.inputs import InputFile
from llmtrain.errors import ConfigError, DataError

LONGEST_DOCUMENT = 1 << 30
"""Bytes of a document, of a line, or of a .json file, unless something else is asked for: each is in memory whole."""

BLOCK_BYTES = 1 << 20

MOST_GROWTH = 250
"""Bytes that a byte of a packed file may give: real text gives 3 to 20, a bomb a thousand and more."""
_GROWTH_FROM = 256 << 20
"""Bytes that a file gives before its growth is looked at."""

SMALLER = (
    "Cut the file into documents: plain text with a separator, such as an empty line, JSON as .jsonl with an object "
    "in each line."
)


class GrowthError(Exception):
    """A packed file gives far more than text can."""


@dataclass(frozen=True)
class Opened:
    """A file that is being read: `file` gives its bytes unpacked. `first` is the number of its first line or part."""

    file: IO[bytes]
    source: InputFile
    longest: int = LONGEST_DOCUMENT
    first: int = 0
    on_disk: Path | None = None
    """Where it lies, for readers that do not take a stream."""
    groups: tuple[int, int] | None = None
    """Which of a table's groups of rows are read; None: all."""

    @property
    def path(self) -> str:
        """The file's name, to show."""
        return self.source.name

    def too_long(self, where: str) -> DataError:
        """The error for something in it that is longer than a document may be."""
        return DataError(f"{where}: a document or line of it has more than {self.longest:,} bytes. {SMALLER}")

    def whole(self) -> bytes | None:
        """The rest of a file; None where it is too long for one document."""
        content = self.file.read(self.longest + 1)
        return None if len(content) > self.longest else content

    def lines(self) -> Iterator[bytes | None]:
        """The lines that are left of a file; None in place of one that is too long, which is passed over unread."""
        while line := self.file.readline(self.longest + 1):
            if len(line) > self.longest:
                while line and not line.endswith(b"\n"):
                    line = self.file.readline(BLOCK_BYTES)
                yield None
            else:
                yield line


class _Blocks(io.RawIOBase):
    """The unpacked bytes of a file, or of a range of a plain one."""

    def __init__(self, packed: Any, unpacked: Any, size: int | None) -> None:
        self._packed, self._unpacked, self._left = packed, unpacked, size
        self._given = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        size = len(buffer) if self._left is None else min(len(buffer), self._left)
        block = self._unpacked.read(size)
        buffer[: len(block)] = block
        self._given += len(block)
        if self._left is not None:
            self._left -= len(block)
        elif self._given > _GROWTH_FROM and self._given > MOST_GROWTH * self._packed.tell():
            raise GrowthError(
                f"it gives more than {self._given:,} bytes, {MOST_GROWTH} times as many as have been read of it"
            )
        return len(block)


@dataclass(frozen=True)
class FileSpan:
    """A part of a file: `begin` and `end` count bytes, or a table's groups of rows. `first` is the number of lines,
    parts or rows before it."""

    begin: int
    end: int
    first: int = 0


@contextmanager
def opened_file(
    source: InputFile, longest: int = LONGEST_DOCUMENT, span: FileSpan | None = None, by_groups: bool = False
) -> Iterator[Opened]:
    """A file, or a span of one, to read; a span of bytes is one of a file that is not packed.

    Raises DataError for what cannot be unpacked or read, within too: the fault shows while it is read.
    """
    opener = OPENERS.get(PurePosixPath(source.name).suffix.lower())
    try:
        with source.on_disk() as path, path.open("rb") as packed:
            unpacked = packed if opener is None else opener(packed, source.name)
            size = None
            if span is not None and not by_groups:
                packed.seek(span.begin)
                size = span.end - span.begin
            file = cast(IO[bytes], io.BufferedReader(_Blocks(packed, unpacked, size), BLOCK_BYTES))
            groups = (span.begin, span.end) if span is not None and by_groups else None
            yield Opened(file, source, longest, 0 if span is None else span.first, path, groups)
    except (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile, GrowthError) as error:
        raise DataError(f"{source.name}: cannot be unpacked: {error}. Copy it again or leave it out.") from None
    except MemoryError:
        raise DataError(f"{source.name}: there is too little memory for a document of it. {SMALLER}") from None
    except OSError as error:
        reason = error.strerror or error
        raise DataError(f"{source.name}: cannot be read ({reason}). Repair it or leave it out.") from None


def _open_zstd(packed: IO[bytes], name: str) -> Any:
    try:
        from backports import zstd  # compression.zstd of Python 3.14
    except ImportError:
        raise ConfigError(
            f"{name}: reading zstd needs the package backports-zstd. Install it, or unpack the file with `zstd -d`."
        ) from None

    class Whole(zstd.ZstdFile):
        """Raises EOFError, which the reader knows, in place of the library's own error."""

        def read(self, size: int | None = -1) -> bytes:
            try:
                return super().read(size)
            except zstd.ZstdError as error:
                raise EOFError(error) from None

    return Whole(packed)


OPENERS: dict[str, Callable[[IO[bytes], str], Any]] = {
    ".gz": lambda packed, _: gzip.GzipFile(fileobj=packed),
    ".bz2": lambda packed, _: bz2.BZ2File(packed),
    ".xz": lambda packed, _: lzma.LZMAFile(packed),  # noqa: SIM115  the caller closes it
    ".zst": _open_zstd,
}
"""How packed files are opened, by the last ending of their names."""
