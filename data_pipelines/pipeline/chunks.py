"""The units of work: chunks of the inputs, each a few small files or a part of a large one.

They follow from names, sizes and contents alone. A large file is divided behind the ends of its records, so that no
record belongs to two chunks and each knows its number in the file.
"""

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_pipelines.reading.formats import FORMATS, format_of, is_packed
from data_pipelines.reading.inputs import InputFile
from data_pipelines.reading.opened import BLOCK_BYTES, FileSpan
from data_pipelines.reading.tables import row_groups
from llmtrain.config.pipelines.schema import FormatName, ReadConfig
from llmtrain.errors import DataError
from llmtrain.files import open_regular


@dataclass(frozen=True)
class SourceFile:
    """A file of an input as it was when the pipeline was planned. `sha256` is empty for a remote one."""

    location: str
    named: bool
    bytes: int
    version: str
    sha256: str

    @property
    def content(self) -> tuple[int, str]:
        """What tells it from another file of its name: the time is none of it where there is a hash."""
        return self.bytes, self.sha256 or self.version

    @property
    def input(self) -> InputFile:
        """The file to read. Raises DataError where it is another one meanwhile."""
        found = InputFile(self.location, self.named)
        if (state := found.state()) != (self.bytes, self.version):
            raise DataError(
                f"{found.name}: was changed since the pipeline was planned: expected {self.bytes} bytes of version "
                f"{self.version}, actual {state[0]} bytes of version {state[1]}. Put it back, or use another name."
            )
        return found


@dataclass(frozen=True)
class FilePiece:
    """A file, by its number in the plan, or a span of it, and how many bytes that is."""

    file: int
    bytes: int
    span: FileSpan | None = None


@dataclass(frozen=True)
class InputChunk:
    """Pieces of one source, which one task reads."""

    source: int
    pieces: tuple[FilePiece, ...]

    @property
    def bytes(self) -> int:
        """What is read of it, packed as it is."""
        return sum(piece.bytes for piece in self.pieces)


@dataclass(frozen=True)
class ScannedFile:
    """A file that was looked at, and where it is divided."""

    file: SourceFile
    spans: tuple[FileSpan, ...] = ()
    """Where each begins and ends; none: it is read as one."""


def scanned(source: InputFile, config: ReadConfig, chunk_bytes: int) -> ScannedFile:
    """Size, hash and divisions of a file. Raises OSError, and DataError for what a server answers."""
    size, version = source.state()
    if source.is_remote:
        return ScannedFile(SourceFile(source.location, source.named, size, version, ""))
    path = Path(source.location)
    name: FormatName | None = format_of(source.location) if config.format == "auto" else config.format
    divided = None if name is None or is_packed(source.location) else FORMATS[name].divided
    separator = b"\n" if divided == "lines" else (config.separator or "").encode() if divided == "parts" else b""
    scan = _Scan(separator if size > chunk_bytes else b"", chunk_bytes)
    with open_regular(path) as file:
        while block := file.read(BLOCK_BYTES):
            scan.take(block)
    spans = _group_spans(path, size, chunk_bytes) if divided == "groups" and size > chunk_bytes else scan.spans()
    return ScannedFile(SourceFile(source.location, source.named, size, version, scan.sha256), spans)


class _Scan:
    """Hashes a file as it passes, and notes a place to divide it behind the first separator of every so many bytes."""

    def __init__(self, separator: bytes, chunk_bytes: int) -> None:
        self._separator, self._chunk_bytes = separator, chunk_bytes
        self._pattern = re.compile(re.escape(separator))
        self._digest = hashlib.sha256()
        self._cuts: list[tuple[int, int]] = [(0, 0)]
        self._end = 0  # bytes that have passed
        self._count = 0  # separators in them
        self._kept = b""  # the last bytes, in which a separator may have begun

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def take(self, block: bytes) -> None:
        self._digest.update(block)
        if not self._separator:
            self._end += len(block)
            return
        window = self._kept + block
        begin = self._end - len(self._kept)  # of the window in the file
        place = 0
        # One after another, as whoever splits the text finds them: separators may overlap themselves.
        for found in self._pattern.finditer(window):
            place = found.end()
            self._count += 1
            if begin + place - self._cuts[-1][0] >= self._chunk_bytes:
                self._cuts.append((begin + place, self._count))
        self._kept = window[max(place, len(window) - len(self._separator) + 1) :]
        self._end = begin + len(window)

    def spans(self) -> tuple[FileSpan, ...]:
        if len(self._cuts) == 1:
            return ()
        cuts = self._cuts if self._cuts[-1][0] < self._end else self._cuts[:-1]
        ends = [cut[0] for cut in cuts[1:]] + [self._end]
        return tuple(FileSpan(begin, end, first) for (begin, first), end in zip(cuts, ends, strict=True))


def _group_spans(path: Path, size: int, chunk_bytes: int) -> tuple[FileSpan, ...]:
    """A table's groups of rows, as many together as have about the size of a chunk."""
    rows = row_groups(path)
    together = max(1, chunk_bytes * len(rows) // size)
    begins = range(0, len(rows), together)
    return tuple(FileSpan(begin, min(begin + together, len(rows)), sum(rows[:begin])) for begin in begins)


def chunks_of(files: Sequence[tuple[int, ScannedFile]], chunk_bytes: int) -> Iterator[InputChunk]:
    """The chunks of (source, file) in their order; files are numbered from 0. A chunk has files of one source."""
    pieces: list[FilePiece] = []
    held, current = 0, files[0][0] if files else 0
    for number, (source, scan) in enumerate(files):
        for piece in _pieces(number, scan):
            if pieces and (source != current or held + piece.bytes > chunk_bytes):
                yield InputChunk(current, tuple(pieces))
                pieces, held = [], 0
            current = source
            pieces.append(piece)
            held += piece.bytes
    if pieces:
        yield InputChunk(current, tuple(pieces))


def _pieces(number: int, scan: ScannedFile) -> Iterator[FilePiece]:
    if not scan.spans:
        yield FilePiece(number, scan.file.bytes)
        return
    whole = scan.spans[-1].end - scan.spans[0].begin
    for span in scan.spans:
        yield FilePiece(number, scan.file.bytes * (span.end - span.begin) // whole, span)
