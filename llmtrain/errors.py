"""Errors that a user can cause, each with the exit code that the command ends with.

A message says what is wrong, where (file, line, or dotted key), the value, what is allowed, and what to do.
The command prints the message and no traceback. Everything else that is raised is a defect of llmtrain.
"""

import errno
import os
from dataclasses import dataclass


class LlmtrainError(Exception):
    """Base of every error that is shown to the user without a traceback."""

    exit_code = 1


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a configuration.

    `key` is the dotted path, `value` the offending value as the user wrote it (None: the key is absent),
    `where` is `file:line`, or "command line" for an override.
    """

    key: str
    message: str
    value: object = None
    where: str = ""
    uses: tuple[str, ...] = ()
    """Other keys that the message rests on; when one of them is itself wrong, this problem is not reported."""

    def __str__(self) -> str:
        value = "" if self.value is None else f" = {self.value!s}"
        where = f" ({self.where})" if self.where else ""
        return f"{self.key}{value}{where}: {self.message}"


class ConfigError(LlmtrainError):
    """The configuration or the command line is wrong; carries every problem that was found."""

    exit_code = 2

    def __init__(self, problems: "list[Problem] | str") -> None:
        self.problems = problems if isinstance(problems, list) else []
        super().__init__(problems if isinstance(problems, str) else "\n".join(str(problem) for problem in problems))


class DataError(LlmtrainError):
    """A data set on storage is damaged or is not what its manifest says."""

    exit_code = 3


class CheckpointError(LlmtrainError):
    """A checkpoint is damaged, incomplete, or does not fit the model."""

    exit_code = 3


class SaveError(CheckpointError):
    """The file system did not take a checkpoint: nothing is damaged, and the next save may succeed."""

    exit_code = 1


class RunFolderInUseError(LlmtrainError):
    """Another process is writing to the run folder."""

    exit_code = 4


class LaunchError(LlmtrainError):
    """The ranks of a run cannot be started, or cannot find each other."""

    exit_code = 1


class PathError(LlmtrainError):
    """The system does not give what a path names: it may not be opened, is of another kind, or cannot be at all."""

    exit_code = 2

    @staticmethod
    def of(error: BaseException | None) -> "PathError | None":
        """The fault of a path that a system call failed on; None where the path alone does not explain it.

        A file that is not there is expected by whoever looks for it. A broken or full device is not a fault of the
        name.
        """
        if not isinstance(error, OSError) or error.errno not in _FAULTS_OF_PATHS:
            return None
        if not isinstance(error.filename, str | bytes):
            return None
        path = os.fsdecode(error.filename)
        shown = path if len(path) <= _LONGEST_SHOWN else f"{path[:_LONGEST_SHOWN]}... ({len(path):,} characters)"
        return PathError(f"{shown}: {error.strerror}. Check the path, and who may read and write there.")


_FAULTS_OF_PATHS = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP),
    *(errno.EEXIST, errno.ENXIO, errno.EINVAL, errno.EFBIG),
)
_LONGEST_SHOWN = 200


class NoProgressError(LlmtrainError):
    """The run fails again and again at the same place: starting it once more would not help."""

    exit_code = 93


class StoppedError(LlmtrainError):
    """Told to stop, and stopped: nothing is wrong, and the same command continues."""

    exit_code = 75


class InstallationError(LlmtrainError):
    """A package that is needed cannot be imported in this environment."""

    exit_code = 1


class ExportError(LlmtrainError):
    """An exported model does not reproduce the numbers of the trained one."""

    exit_code = 1


EXIT_PREEMPTED = 75
"""The run saved and stopped because it was told to: start it again (sysexits.h, EX_TEMPFAIL)."""

EXIT_TOLD_TWICE = 143
"""The run was told twice to stop and did so at once, without saving (128 + SIGTERM)."""
