"""The folder of a pipeline at work: files of tasks, and the records without which they do not exist.

A task writes its files under other names, syncs and renames them, and then writes `done/<stage>-<number>.json` with
their sizes and hashes. So a kill leaves nothing that looks whole, and a file that was damaged later is noticed by
whoever reads it: the task that wrote it is done again.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import IO, Any

from data_pipelines.pipeline.plan import Plan
from data_pipelines.pipeline.program import PipelineStage, Program
from llmtrain.config.pipelines.schema import PipelineConfig
from llmtrain.errors import LlmtrainError
from llmtrain.files import read_json, replace_file, sealed, sync_folder, unsealed

WORK_FOLDER = "work"
DONE_FOLDER = "done"
_RECORD_BYTES = 256 << 20
_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class DataTask:
    """One piece of work of a stage, by number from 0."""

    stage: str
    number: int

    def __str__(self) -> str:
        return f"{self.stage}-{self.number:06d}"


class DamagedWorkError(LlmtrainError):
    """A file that another task wrote is not what that task's record says: it has to be done again."""

    def __init__(self, task: DataTask, message: str) -> None:
        super().__init__(message)
        self.task = task


@dataclass(frozen=True)
class Done:
    """What a finished task says: its files by their endings, with size and hash, and what it counted."""

    files: dict[str, tuple[int, str]]
    counters: dict[str, Any]


@dataclass
class Output:
    """The files that a task is writing, by their endings."""

    folder: Path
    stem: str
    files: dict[str, tuple[int, str]] = field(default_factory=dict)

    @contextmanager
    def file(self, ending: str) -> Iterator[IO[bytes]]:
        """A file to write, which gets its name once it is whole and on the disk."""
        path = self.folder / f"{self.stem}{ending}"
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            with partial.open("w+b") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
                self.files[ending] = (file.tell(), _sha256(file))
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    def adopt(self, ending: str, path: Path) -> None:
        """Give a finished file that lies in the folder under another name its own."""
        with path.open("rb") as file:
            os.fsync(file.fileno())
            digest = _sha256(file)
            self.files[ending] = (file.tell(), digest)
        path.replace(self.folder / f"{self.stem}{ending}")


def _sha256(file: IO[bytes]) -> str:
    file.seek(0)
    return hashlib.file_digest(file, "sha256").hexdigest()  # pyright: ignore[reportArgumentType]


@dataclass(frozen=True)
class Workspace:
    """A pipeline's folder, configuration and plan: all that a task needs to know."""

    folder: Path
    config: PipelineConfig
    plan: Plan

    @cached_property
    def program(self) -> Program:
        """The order of work."""
        return Program(self.config)

    def stage(self, name: str) -> PipelineStage:
        """A stage by its name."""
        return next(stage for stage in self.program.stages if stage.name == name)

    def path(self, task: DataTask, ending: str) -> Path:
        """A file of a task."""
        return self.folder / WORK_FOLDER / task.stage / f"{task.number:06d}{ending}"

    def _record_path(self, task: DataTask) -> Path:
        return self.folder / DONE_FOLDER / f"{task}.json"

    def done(self, task: DataTask) -> Done | None:
        """The record of a task; None where it is not finished, or belongs to another plan."""
        try:
            found = unsealed(read_json(self._record_path(task), _RECORD_BYTES))
            if found["plan"] != self.plan.id:
                return None
            files = {str(ending): (int(size), str(digest)) for ending, (size, digest) in found["files"].items()}
            return Done(files, found["counters"])
        except (OSError, ValueError, KeyError, TypeError):
            return None  # it is done again

    def require_done(self, task: DataTask) -> Done:
        """The record of a task that has to be finished. Raises DamagedWorkError."""
        record = self.done(task)
        if record is None:
            raise DamagedWorkError(task, f"{self._record_path(task)}: is missing or damaged")
        return record

    def is_done(self, task: DataTask) -> bool:
        """True where the task is finished and its files are there in their sizes."""
        record = self.done(task)
        if record is None:
            return False
        sizes = ((self.path(task, ending), size) for ending, (size, _) in record.files.items())
        return all(path.is_file() and path.stat().st_size == size for path, size in sizes)

    def run(self, task: DataTask, action: Callable[[Output], dict[str, Any]]) -> Done:
        """Let an action write a task's files and return its counters; then write the record."""
        folder = self.path(task, "").parent
        folder.mkdir(parents=True, exist_ok=True)
        output = Output(folder, f"{task.number:06d}")
        counters = action(output)
        sync_folder(folder)
        record = {"plan": self.plan.id, "task": str(task), "files": output.files, "counters": counters}
        path = self._record_path(task)
        replace_file(path, json.dumps(sealed(record)).encode())
        sync_folder(path.parent)
        return Done(output.files, counters)

    def forget(self, task: DataTask) -> None:
        """Take the record of a task away, so that it is done again."""
        self._record_path(task).unlink(missing_ok=True)

    def checked(self, task: DataTask, ending: str) -> Path:
        """A file of a finished task, once its hash was checked. Raises DamagedWorkError."""
        path = self.path(task, ending)
        try:
            state = path.stat()
            if _CHECKED.get(path) != (state.st_mtime_ns, state.st_size):
                expected = self.require_done(task).files.get(ending)
                with path.open("rb") as file:
                    if (state.st_size, _sha256(file)) != expected:
                        raise DamagedWorkError(task, f"{path}: its hash is not that of {self._record_path(task)}")
                _CHECKED[path] = (state.st_mtime_ns, state.st_size)
        except OSError as error:
            raise DamagedWorkError(task, f"{path}: cannot be read ({error.strerror})") from None
        return path

    def num_tasks(self, stage: PipelineStage) -> int:
        """How many tasks a stage has. Of some it follows from what the stages before have counted."""
        match stage.kind:
            case "documents" | "tokens" | "export":
                return len(self.plan.chunks)
            case "exact" | "bands":
                return int(self.require_done(DataTask(f"count-{stage.segment}", 0)).counters[stage.kind])
            case "shards":
                return int(self.require_done(DataTask("order", 0)).counters["shards"])
            case _:
                return 1


_CHECKED: dict[Path, tuple[int, int]] = {}
"""Time and size of files that this process has hashed already: some are looked at by every task."""
