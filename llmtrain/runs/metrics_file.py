"""metrics.jsonl: one JSON object per recorded row, appended, durable after `flush`; read whole or from its end.

JSON has no NaN and no infinity. They are written as the strings "NaN", "Infinity" and "-Infinity", which Python's
`float`, JavaScript's `Number` and pandas all turn into the number; `read_rows` does so.
"""

import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path
from typing import Any

from llmtrain.errors import DataError
from llmtrain.files import LINE_BYTES, iter_lines, open_regular, parse_json
from llmtrain.values.progress import RESUMED_FROM, ROW_KINDS, TASK_SECONDS, Row, RowKind, row_kind

METRICS_FILE = "metrics.jsonl"

_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_TAIL_BYTES = 1 << 16
MOST = 10**18
"""No count of a run is larger, and no time is later."""

BLOCK_BYTES = 1 << 20

_TRAINING = frozenset(("loss", "time", "step_seconds", "tokens_per_second"))
_MARKS = tuple(f'"{key}"'.encode() for key in ("valid_loss", TASK_SECONDS, RESUMED_FROM))
"""Keys of the rows that are looked for once there are enough training rows."""


class JsonlTracker:
    """Appends rows to a file. Each row is one write, so that a reader of a live run sees whole rows.

    `resume_step` is the step that the run continues after. A torn last line is cut; nothing else is removed. The first
    row that is written to a file with a past carries `resumed_from`: it replaces all earlier rows after that step.
    """

    def __init__(self, path: Path, resume_step: int = 0) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            open_regular(path).close()  # a pipe would wait for a reader
        self._file = path.open("r+b" if path.exists() else "x+b", buffering=0)
        self._size_bytes = _end_of_last_whole_line(self._file.fileno())
        self._file.truncate(self._size_bytes)
        self._file.seek(self._size_bytes)
        self._resumed_from = resume_step if resume_step or self._size_bytes else None

    def log(self, row: Row) -> None:
        """Append one row. Raises OSError where it cannot be written; the file then still ends with a whole row."""
        cells = dict(row)
        for key, value in row.items():
            if isinstance(value, float) and not math.isfinite(value):
                cells[key] = "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
        if self._resumed_from is not None:
            # A run that resumes may go back further before its first row.
            cells[RESUMED_FROM] = min(self._resumed_from, cells.get(RESUMED_FROM, self._resumed_from))
        line = json.dumps(cells, allow_nan=False).encode() + b"\n"
        try:
            written = self._file.write(line)
            if written != len(line):
                raise OSError(f"{self._file.name}: wrote {written} of {len(line)} bytes of a row")
        except OSError:
            self._file.truncate(self._size_bytes)
            self._file.seek(self._size_bytes)
            raise
        self._size_bytes += len(line)
        self._resumed_from = None

    def flush(self) -> None:
        """Wait until all rows are on the storage device."""
        os.fsync(self._file.fileno())

    def close(self, status: str) -> None:
        """Make all rows durable and close the file."""
        self.flush()
        self._file.close()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows that count, in order of their steps. Raises DataError for a damaged line."""
    return rows_that_count(iter_rows(path))


def rows_that_count(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of all rows as written, those that no later one replaces, in order of their steps.

    A row with `resumed_from: N` replaces all earlier rows after step N. Where a file lacks that key, a row whose step
    lies before the previous row's, or that repeats a step, replaces all from its step on. So rows of an attempt that
    got further than the one that followed it do not show.
    """
    kept: list[dict[str, Any]] = []
    for row in rows:
        restart = row.get(RESUMED_FROM)
        if restart is None and _goes_back(kept, row):
            restart = row["step"] - 1
        if restart is not None:
            while kept and kept[-1]["step"] > restart:
                kept.pop()
        kept.append(row)
    return kept


def iter_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Every row as written, replaced ones included; a last line without its end is left out.

    Raises DataError for a damaged line, and where the path is not a file that can be read.
    """
    try:
        for number, line in enumerate(iter_lines(path), start=1):
            if not line.endswith(b"\n"):
                return
            try:
                yield parse_row(line)
            except ValueError as error:
                raise DataError(
                    f"{path}:{number}: not a row of metrics ({error}): {line[:80]!r}. "
                    "Remove that line; training does not need it."
                ) from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None


def parse_row(line: bytes) -> dict[str, Any]:
    """A row from its line. Raises ValueError where it is none, or holds what no run has recorded."""
    row = parse_json(line)
    if not isinstance(row, dict):
        raise ValueError("no object")
    for key in ("step", RESUMED_FROM):
        value = row.get(key, 0 if key == RESUMED_FROM else None)
        if type(value) is not int or not 0 <= value <= MOST:
            raise ValueError(f"no whole number `{key}`")
    row = {key: _NOT_FINITE.get(value, value) if isinstance(value, str) else value for key, value in row.items()}
    for key, value in row.items():
        if isinstance(value, str | dict | list) or value is None:
            raise ValueError(f"`{key}` is not a number")
        if (key == "time" or key.endswith("_seconds")) and not abs(value) <= MOST:
            raise ValueError(f"`{key}` is not a time")
        if isinstance(value, int) and abs(value) > MOST:
            raise ValueError(f"`{key}` has more digits than any number of a run")
    return row


def _goes_back(kept: list[dict[str, Any]], row: Row) -> bool:
    if not kept or row["step"] > kept[-1]["step"]:
        return False
    if row["step"] < kept[-1]["step"]:
        return True
    same_step = [other for other in kept[-len(ROW_KINDS) :] if other["step"] == row["step"]]
    return any(row_kind(other) == row_kind(row) for other in same_step)


def _end_of_last_whole_line(descriptor: int) -> int:
    """Position after the last line end of a file; 0 where it has none."""
    end = os.fstat(descriptor).st_size
    while end > 0:
        start = max(0, end - _TAIL_BYTES)
        newline = os.pread(descriptor, end - start, start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0


@dataclass(frozen=True)
class NewestRows:
    """Of the rows that count: the last training rows of the newest attempt that has any, the last evaluation, and where
    it is asked for, the last evaluation on tasks."""

    training: list[Row] = field(default_factory=list)
    evaluation: Row | None = None
    tasks: Row | None = None


def newest_rows(metrics: Path, most: int, last_step: int | None = None, tasks: bool = False) -> NewestRows:
    """The last `most` training rows and the last evaluations. Rows that cannot be read are left out.

    `last_step` is that of a run that has gone back to it and written no row since: later ones will be replaced.
    Which rows count is as in `rows_that_count`. Where a run is never evaluated the whole file is looked through, and
    few rows of it are parsed. Raises DataError where something else stands in the file's place.
    """
    search = _Search(most, last_step, {"evaluation", "tasks"} if tasks else {"evaluation"})
    try:
        with open_regular(metrics) as file:
            for block in _iter_blocks_back(file):
                if search.takes(block) and search.found_in(block):
                    break
    except FileNotFoundError:
        return NewestRows()
    except OSError as error:
        raise DataError(f"{metrics}: cannot be read: {error.strerror}. Remove it: a run writes another one.") from None
    return NewestRows(search.training[::-1], search.found.get("evaluation"), search.found.get("tasks"))


class _Search:
    """Goes through rows from the last one on. A row counts that none behind it in the file replaces."""

    def __init__(self, most: int, last_step: int | None, wanted: set[RowKind]) -> None:
        self.training: list[Row] = []
        self.found: dict[RowKind, Row] = {}
        """The last row of each kind that is wanted."""
        self._most, self._wanted = most, wanted
        self._has_training = False
        self._limit = last_step
        """Rows of later steps are replaced."""
        self._may_repeat = True
        """Any row of this very step counts too; else those that are recorded before the one that was seen last."""
        self._seen: RowKind = "training"

    def takes(self, block: bytes) -> bool:
        """True where a block may hold a row that is looked for."""
        return not self._has_training or any(mark in block for mark in _MARKS)

    def found_in(self, block: bytes) -> bool:
        """Look through a block of whole lines; returns whether nothing is looked for any more."""
        for line in reversed(block.split(b"\n")):
            if line and self.takes(line):
                try:
                    self._look_at(parse_row(line))
                except ValueError:
                    continue
                if self._has_training and self.found.keys() == self._wanted:
                    return True
        return False

    def _look_at(self, row: dict[str, Any]) -> None:
        if self._counts(row):
            if (kind := row_kind(row)) in self._wanted:
                self.found.setdefault(kind, row)
            elif not self._has_training and row.keys() >= _TRAINING:
                self.training.append(row)
        # Rows after the step that a start continued from are replaced by that start, those of the step itself are not.
        if RESUMED_FROM in row and (self._limit is None or row[RESUMED_FROM] < self._limit):
            self._limit, self._may_repeat = row[RESUMED_FROM], True
        # The rows of an attempt before have another pace.
        begins_attempt = RESUMED_FROM in row and bool(self.training)
        self._has_training = self._has_training or begins_attempt or len(self.training) == self._most

    def _counts(self, row: dict[str, Any]) -> bool:
        step, kind = row["step"], row_kind(row)
        # A step is recorded before it is evaluated: what stands before its training row is of an attempt before.
        repeats = self._may_repeat or ROW_KINDS.index(kind) < ROW_KINDS.index(self._seen)
        if self._limit is not None and (step > self._limit or (step == self._limit and not repeats)):
            return False
        self._limit, self._may_repeat, self._seen = step, False, kind
        return True


def _iter_blocks_back(file: BufferedReader) -> Iterator[bytes]:
    """The lines of a file in blocks, the last ones first. A last line without its end is left out, and a line longer
    than any row is cut short, so that it cannot be taken for one."""
    position, rest, is_torn = file.seek(0, os.SEEK_END), b"", True
    while position > 0:
        begin = max(0, position - BLOCK_BYTES)
        file.seek(begin)
        block = file.read(position - begin) + rest
        position = begin
        if is_torn:
            block = block[: block.rfind(b"\n") + 1]
            is_torn = not block
        begin_of_lines = (block.find(b"\n") + 1 or len(block)) if position else 0
        yield block[begin_of_lines:]
        rest = block[:begin_of_lines] if begin_of_lines <= LINE_BYTES else b""
