"""Trying again what may pass: a file server that stumbles, a network that is silent for a moment."""

import errno
import random
import time
from collections.abc import Callable
from typing import TypeVar

from llmtrain.errors import DataError

Result = TypeVar("Result")

FIRST_PAUSE_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 30.0

PASSING_ERRORS = frozenset(
    (
        errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EINTR, errno.EBUSY, errno.ENFILE, errno.EMFILE,
        errno.ECONNRESET, errno.ECONNREFUSED, errno.ECONNABORTED, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN,
    )
)  # fmt: skip
"""Errors of the system that say nothing about the file: the next try may succeed."""


class PassingFaultError(Exception):
    """Something that may be gone at the next try; `final` is what to raise where it is not."""

    def __init__(self, message: str, final: DataError | None = None) -> None:
        super().__init__(message)
        self.final = final


def retried(action: Callable[[], Result], attempts: int, subject: str) -> Result:
    """The result of an action, called up to `attempts` times with growing random pauses while its faults may pass.

    `subject` names in messages what is read. Raises DataError where the last try failed too, or a fault will not pass.
    """
    attempt = 0
    while True:
        attempt += 1
        try:
            return action()
        except PassingFaultError as fault:
            reason, final = str(fault), fault.final
        except OSError as error:
            reason, final = error.strerror or str(error), None
            if error.errno not in PASSING_ERRORS:
                raise DataError(f"{subject}: cannot be read: {reason}. Check the file and its rights.") from None
        if attempt >= attempts:
            raise final or DataError(
                f"{subject}: cannot be read: {reason} ({attempts} attempts). The same command continues once it can; "
                "data.fetch_attempts and data.fetch_timeout_seconds say how patient a run is."
            )
        time.sleep(pause_seconds(attempt))


def pause_seconds(attempt: int) -> float:
    """The pause after a failed attempt (from 1): doubled each time, and random, so that ranks do not come together."""
    return min(LONGEST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2 ** (attempt - 1)) * random.uniform(0.5, 1.0)
