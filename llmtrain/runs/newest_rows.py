"""The newest rows of a run's metrics, found from the end of the file: it may be as long as the run is."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path
from typing import Any

from llmtrain.errors import DataError
from llmtrain.files import LINE_BYTES, open_regular
from llmtrain.runs.metrics_file import parse_row
from llmtrain.values.progress import RESUMED_FROM, Row

BLOCK_BYTES = 1 << 20

_TRAINING = frozenset(("loss", "time", "step_seconds", "tokens_per_second"))
_MARKS = tuple(f'"{key}"'.encode() for key in ("valid_loss", RESUMED_FROM))
"""What rows have that are looked for once there are enough training rows."""


@dataclass(frozen=True)
class NewestRows:
    """Of the rows that count: the last training rows of the newest attempt that has any, and the last evaluation."""

    training: list[Row] = field(default_factory=list)
    evaluation: Row | None = None


def newest_rows(metrics: Path, most: int, last_step: int | None = None) -> NewestRows:
    """The last `most` training rows and the last evaluation. Rows that cannot be read are left out.

    `last_step` is that of a run that has gone back to it and written no row since: later ones will be replaced.
    Which rows count is as in `rows_that_count`. Where a run is never evaluated the whole file is looked through, and
    few rows of it are parsed. Raises DataError where something else stands in the file's place.
    """
    search = _Search(most, last_step)
    try:
        with open_regular(metrics) as file:
            for block in _iter_blocks_back(file):
                if search.takes(block) and search.found_in(block):
                    break
    except FileNotFoundError:
        return NewestRows()
    except OSError as error:
        raise DataError(f"{metrics}: cannot be read: {error.strerror}. Remove it: a run writes another one.") from None
    return NewestRows(search.training[::-1], search.evaluation)


class _Search:
    """Goes through rows from the last one on. A row counts that none behind it in the file replaces."""

    def __init__(self, most: int, last_step: int | None) -> None:
        self.training: list[Row] = []
        self.evaluation: Row | None = None
        self._most = most
        self._has_training = False
        self._limit = last_step
        """Rows of later steps are replaced."""
        self._may_repeat = True
        """Whether any row of this very step counts too; else, of an evaluation, the training row does."""
        self._saw_evaluation = False

    def takes(self, block: bytes) -> bool:
        """Whether a block may hold a row that is looked for."""
        return not self._has_training or any(mark in block for mark in _MARKS)

    def found_in(self, block: bytes) -> bool:
        """Look through a block of whole lines; returns whether nothing is looked for any more."""
        for line in reversed(block.split(b"\n")):
            if line and self.takes(line):
                try:
                    self._look_at(parse_row(line))
                except ValueError:
                    continue
                if self._has_training and self.evaluation is not None:
                    return True
        return False

    def _look_at(self, row: dict[str, Any]) -> None:
        if self._counts(row):
            if "valid_loss" in row:
                self.evaluation = self.evaluation or row
            elif not self._has_training and row.keys() >= _TRAINING:
                self.training.append(row)
        if RESUMED_FROM in row:
            self._replace_after(row[RESUMED_FROM])
        # The rows of an attempt before have another pace.
        begins_attempt = RESUMED_FROM in row and bool(self.training)
        self._has_training = self._has_training or begins_attempt or len(self.training) == self._most

    def _counts(self, row: dict[str, Any]) -> bool:
        step, is_evaluation = row["step"], "valid_loss" in row
        # A step is recorded before it is evaluated: what stands before its training row is of an attempt before.
        repeats = self._may_repeat or (self._saw_evaluation and not is_evaluation)
        if self._limit is not None and (step > self._limit or (step == self._limit and not repeats)):
            return False
        self._limit, self._may_repeat, self._saw_evaluation = step, False, is_evaluation
        return True

    def _replace_after(self, step: int) -> None:
        """Rows after a step are replaced, those of the step itself are not."""
        if self._limit is None or step < self._limit:
            self._limit, self._may_repeat = step, True


def _iter_blocks_back(file: BufferedReader) -> Iterator[bytes]:
    """The lines of a file in blocks, the last ones first. A last line without its end is left out, and of a line that
    is longer than a row can be only its begin is told, which is no row."""
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
