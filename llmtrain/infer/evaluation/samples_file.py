"""The file of samples that an evaluation writes as it goes, and goes on from where it was stopped."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from llmtrain.errors import ConfigError
from llmtrain.files import iter_lines, open_to_go_on, parse_json

LONGEST_ROW = 1 << 28


class SamplesFile:
    """JSON lines, one per sample: the task, the sample's number, what was found, and `of`, which says of what model and
    task that is true. Without a path nothing is kept."""

    def __init__(self, path: Path | None, expected: Mapping[str, str]) -> None:
        """`expected` is `of` by task."""
        self._path, self._expected = path, expected
        self._found = dict[tuple[str, int], dict[str, Any]]()
        self._file: IO[bytes] | None = None

    def __enter__(self) -> Self:
        """Raises ConfigError for a file that is another one, or of something else, or that another process writes."""
        if self._path is None:
            return self
        try:
            self._file = open_to_go_on(self._path)
        except OSError as error:
            told = error.strerror or error
            raise ConfigError(f"--out {self._path}: cannot be written: {told}. Name another file.") from None
        try:
            self._read(self._path)
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._file is not None:
            self._file.close()

    def found(self, task: str, number: int) -> dict[str, Any] | None:
        """What an earlier evaluation has found about a sample."""
        return self._found.get((task, number))

    def add(self, task: str, rows: Iterable[tuple[int, Mapping[str, Any]]]) -> None:
        """Write samples by their numbers. They are in the file when it returns."""
        if self._file is None:
            return
        for number, row in rows:
            line = {"task": task, "sample": number, "of": self._expected[task], **row}
            self._file.write(json.dumps(line, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")
        self._file.flush()

    def _read(self, path: Path) -> None:
        whole = 0
        for number, line in enumerate(iter_lines(path, LONGEST_ROW), start=1):
            if not line.endswith(b"\n"):
                break  # an interrupted evaluation has begun to write it
            row: dict[str, Any] = {}
            try:
                row = parse_json(line)
                key = (row["task"], row["sample"])
                of = row["of"]
                known = isinstance(row["scores"], dict) and isinstance(key[0], str) and isinstance(key[1], int)
            except (ValueError, KeyError, TypeError):
                known, key, of = False, ("", 0), None
            if not known:
                raise ConfigError(
                    f"--out {path}:{number}: is no line of an evaluation. Name another file, or remove this one."
                )
            if of != self._expected.get(key[0], of):
                raise ConfigError(
                    f"--out {path}:{number}: holds samples of the task {key[0]} with another model, other data or "
                    "other settings. Name another file, or remove this one."
                )
            self._found[key] = row
            whole += len(line)
        if whole < path.stat().st_size:
            os.truncate(path, whole)
