"""Failures of ranks, as they tell them and as a person reads them: the cause in full, then a line per rank."""

import json
import signal
import socket
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from llmtrain.errors import ConfigError, LaunchError, LlmtrainError


class OtherRankFailedError(LlmtrainError):
    """This rank ends because another one did; the exit code is that one's."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True)
class Failure:
    """The end of one rank. `seconds` is the machine's monotonic clock, to tell which failed first.

    `details` is the whole text: a traceback for a defect, the message for what a user can mend. `consequence` says that
    another rank's failure is the reason; `killed` that it did not end by itself; `lasting` that it would happen again,
    because a person must mend something first. Without a `host`, it is the launcher's own.
    """

    rank: int
    exit_code: int
    summary: str
    details: str
    consequence: bool = False
    killed: bool = False
    lasting: bool = False
    host: str = field(default_factory=socket.gethostname)
    seconds: float = field(default_factory=time.monotonic)

    @staticmethod
    def of_error(rank: int, error: BaseException) -> "Failure":
        """The failure that an exception means."""
        summary = f"{type(error).__name__}: {error}"
        if isinstance(error, LlmtrainError):
            lines = [str(problem) for problem in error.problems] if isinstance(error, ConfigError) else []
            details = "\n".join([*(lines or [str(error)]), *getattr(error, "__notes__", ())])
            consequence = isinstance(error, OtherRankFailedError)
            # That ranks did not find each other may pass; what else llmtrain foresees, a person must mend.
            lasting = not isinstance(error, LaunchError)
            return Failure(rank, error.exit_code, str(error), details, consequence, lasting=lasting)
        return Failure(rank, 1, summary, "".join(traceback.format_exception(error)).rstrip())

    @staticmethod
    def of_exit(rank: int, exit_code: int, host: str = "") -> "Failure":
        """The failure of a process that ended without a word; a negative code is the signal that killed it."""
        host = host or socket.gethostname()
        if exit_code >= 0:
            text = f"ended with exit code {exit_code} and said nothing"
            return Failure(rank, exit_code or 1, text, text, host=host)
        text = f"was killed by {_signal_name(-exit_code)}"
        hint = ". When memory runs out, the system kills: see `dmesg`" if -exit_code == signal.SIGKILL else ""
        # A death is noticed a moment after the peers have noticed it: it counts as earlier than what they say.
        return Failure(rank, 1, text, text + hint, killed=True, host=host, seconds=0.0)

    @property
    def is_defect(self) -> bool:
        """True where the failure was not foreseen, so that the log may tell more."""
        return self.exit_code == 1

    @property
    def place(self) -> str:
        """The rank and its machine; empty where the failure is the launcher's own."""
        return f"rank {self.rank} on {self.host}" if self.host else ""

    def to_bytes(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @staticmethod
    def from_bytes(content: bytes) -> "Failure":
        return Failure(**json.loads(content))


def first_cause(failures: Sequence[Failure]) -> Failure:
    """The failure that explains the others."""
    return min(failures, key=lambda failure: (failure.consequence, failure.seconds, failure.rank))


def failure_text(failures: Sequence[Failure], stopped: Sequence[int] = (), logs: str = "", alone: bool = False) -> str:
    """The failures as a person reads them.

    `stopped` are the ranks that had to be ended, `logs` is where the ranks' logs are; a rank `alone` needs no name.
    """
    cause = first_cause(failures)
    place = "" if alone else cause.place
    lines = [": ".join(part for part in ("error", place, cause.details) if part)]
    if "\n" in cause.details:
        lines = [f"error: {place or 'the run'} failed:", cause.details]
    others = sorted((failure for failure in failures if failure is not cause), key=lambda failure: failure.rank)
    lines += [f"then rank {other.rank} on {other.host}: " + other.summary.partition("\n")[0] for other in others]
    lines += [f"then rank {rank}: stopped" for rank in stopped]
    return "\n".join([*lines, *([f"logs: {logs}"] if logs else [])])


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
