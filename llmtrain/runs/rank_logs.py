"""The logs of a run's ranks, read whole or followed while ranks come, go and start again."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from llmtrain.errors import DataError
from llmtrain.files import open_regular

LOGS = "logs"
"""The folder inside a run folder."""

_NAME = re.compile(r"^rank-(\d{5,})\.log$")
_ATTEMPT = re.compile(r"^=== (\d{4}-\d\d-\d\dT\S+) rank ")
_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class Line:
    """One line of a rank's log, without its end."""

    rank: int
    text: str


def log_path(run_dir: Path, rank: int) -> Path:
    """The log of a rank, appended over attempts."""
    return run_dir / LOGS / f"rank-{rank:05d}.log"


def rank_files(run_dir: Path) -> dict[int, Path]:
    """The logs of all ranks that a run has ever had, by rank."""
    folder = run_dir / LOGS
    found = ((_NAME.match(entry.name), entry) for entry in folder.iterdir()) if folder.is_dir() else ()
    return {int(match[1]): path for match, path in sorted(found, key=lambda pair: pair[1].name) if match}


def written_lines(
    files: Mapping[int, Path], num_lines: int | None = None, ends: Mapping[int, int] | None = None
) -> Iterator[Line]:
    """The lines of the logs: attempt by attempt in order of time, in each of them rank by rank.

    With `num_lines`, the last ones of each rank; with `ends`, no more than so many bytes of each log. Bytes that are
    not text are replaced.
    """
    parts: list[tuple[str, int, list[str]]] = []
    for rank, path in files.items():
        content = _content(path)[: ends[rank] if ends else None]
        texts = [line.rstrip("\r") for line in content.decode(errors="replace").split("\n")]
        texts = texts if texts[-1] else texts[:-1]
        began, lines = "", []
        for text in texts if num_lines is None else texts[max(0, len(texts) - num_lines) :]:
            head = _ATTEMPT.match(text)
            if head:
                parts.append((began, rank, lines))
                began, lines = head[1], []
            lines.append(text)
        parts.append((began, rank, lines))
    for _, rank, lines in sorted(parts, key=lambda part: part[:2]):
        for text in lines:
            yield Line(rank, text)


def _content(path: Path) -> bytes:
    try:
        with open_regular(path) as file:
            return file.read()
    except OSError as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(f"{path}: cannot be read: {error.strerror}. Remove it: a run writes another one.")


@dataclass
class _Tail:
    """How far a log has been read. `rest` is a line whose end is not there yet."""

    position: int = 0
    rest: bytes = b""


@dataclass
class Follower:
    """Reads what is appended to the logs of `choose()`, from where `skip_written` has stood; new logs from their start.

    A log that has become shorter was replaced, and is read from its start.
    """

    choose: Callable[[], dict[int, Path]]
    _tails: dict[int, _Tail] = field(default_factory=dict)

    def skip_written(self) -> dict[int, int]:
        """Begin after the last whole line that is there now; returns the size of what is passed over, by rank."""
        for rank, path in self.choose().items():
            self._tails[rank] = _Tail(_content(path).rfind(b"\n") + 1)
        return {rank: tail.position for rank, tail in self._tails.items()}

    def new_lines(self) -> Iterator[Line]:
        """The whole lines that have come since, rank by rank."""
        for rank, path in self.choose().items():
            tail = self._tails.setdefault(rank, _Tail())
            yield from (Line(rank, text) for text in self._read(path, tail))

    def unfinished_lines(self) -> Iterator[Line]:
        """Lines whose end has never come: what a killed rank was writing."""
        for rank, tail in sorted(self._tails.items()):
            if tail.rest:
                yield Line(rank, tail.rest.decode(errors="replace"))
                tail.rest = b""

    def _read(self, path: Path, tail: _Tail) -> Iterable[str]:
        try:
            with open_regular(path) as file:
                if path.stat().st_size < tail.position:
                    tail.position, tail.rest = 0, b""
                file.seek(tail.position)
                while block := file.read(_BLOCK_BYTES):
                    tail.position += len(block)
                    *whole, tail.rest = (tail.rest + block).split(b"\n")
                    yield from (line.decode(errors="replace").rstrip("\r") for line in whole)
        except FileNotFoundError:
            return
        except OSError as error:
            raise _unreadable(path, error) from None
