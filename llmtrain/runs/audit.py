"""audit.jsonl: the decisions about a run and why, one JSON object per line, on the disk before they take effect.

Events and their facts are listed in docs/operations/. Every line has `time` (ISO, UTC) and `event`. Whoever decides
appends: rank 0 while it trains, the launcher between attempts. An attempt is one start of the run, by a person, by a
scheduler, or by a launcher after a failure.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import blake2b
from pathlib import Path
from typing import Any

from llmtrain.errors import DataError
from llmtrain.files import iter_lines, open_regular, parse_line, sealed_line

AUDIT_FILE = "audit.jsonl"

STARTED = "started"
"""The audit log's event of every start of the ranks, the first included.

`step` is the one that it continues after, `workers` the number of ranks, `number` counts from 1; `data` has one object
for each source: its tokens, those that no sample holds, and how often the run goes through it.
"""

ROLLBACK = "rollback"
"""The event of going back past data: samples `first_sample` to `end_sample` are passed over from there on."""

NUMBERS = ("step", "first_sample", "end_sample", "rank", "workers", "number")
"""Facts that others reckon with, where an event has them."""
MOST = 10**18

_MEND = "Remove that line, or put back what it said: without a rollback's line the run reads those samples again."


def record(run_dir: Path, event: str, **facts: Any) -> None:
    """Append one event to the run's audit log, durably. Facts are JSON without NaN. Raises OSError."""
    time = datetime.now(UTC).isoformat(timespec="milliseconds")
    line = sealed_line({"time": time, "event": event, **facts})
    with open_regular(run_dir / AUDIT_FILE, "ab+") as file:
        # A line that a crash has torn gets its end here: it spoils itself only.
        if file.tell() and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n":
            file.write(b"\n")
        file.write(line)
        # What is decided takes effect after this: a crash must not make it undecided again.
        file.flush()
        os.fsync(file.fileno())


def iter_events(run_dir: Path, *events: str) -> Iterator[dict[str, Any]]:
    """The recorded events, oldest first; all kinds, or those named. A torn line is left out.

    Raises DataError where the file holds something else than events, or cannot be read.
    """
    path = run_dir / AUDIT_FILE
    try:
        for number, line in enumerate(iter_lines(path), start=1):
            try:
                row = parse_line(line)
                fault = _fault(row)
            except ValueError as error:
                row, fault = {}, str(error)
            if row is None:
                continue
            if fault:
                raise DataError(f"{path}:{number}: not an event of a run ({fault}): {line[:80]!r}. {_MEND}")
            if not events or row["event"] in events:
                yield row
    except FileNotFoundError:
        return
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None


def _fault(row: Any) -> str | None:
    """The fault of a line of the log; None where it is an event."""
    if not isinstance(row, dict) or not isinstance(row.get("event"), str):
        return "no text `event`"
    try:
        if datetime.fromisoformat(row["time"]).utcoffset() is None:
            return "`time` without a zone"
    except (KeyError, TypeError, ValueError):
        return "no ISO `time`"
    wrong = [key for key in NUMBERS if not isinstance(row.get(key, 0), int) or abs(row.get(key, 0)) > MOST]
    return f"no whole number `{wrong[0]}`" if wrong else None


@dataclass(frozen=True)
class StartedAttempt:
    """One attempt, which continues from `step`. `run_id` is the run folder's, the same in all of its attempts."""

    number: int = 1
    run_id: str = ""
    step: int = 0


def begin_attempt(run_dir: Path, step: int, workers: int, data: Sequence[Mapping[str, Any]] = ()) -> StartedAttempt:
    """Count this attempt among those of a run folder, and record it. Raises DataError for a damaged audit log.

    Where the file system does not take the line, training goes on.
    """
    earlier = list(iter_events(run_dir, STARTED))
    number = len(earlier) + 1
    # A short text that no other run folder has: by its place and the time.
    where = f"{run_dir.resolve()} {run_dir.stat().st_ctime_ns}".encode()
    known = next((event["run_id"] for event in earlier if "run_id" in event), None)
    run_id = known or blake2b(where, digest_size=4).hexdigest()
    with suppress(OSError):
        record(run_dir, STARTED, step=step, workers=workers, number=number, run_id=run_id, data=data)
    return StartedAttempt(number, run_id, step)


def skipped_windows(run_dir: Path) -> tuple[tuple[int, int], ...]:
    """The windows [first, end) of data that a run passes over, as its audit log says. Raises DataError where that is
    damaged."""
    try:
        return tuple((row["first_sample"], row["end_sample"]) for row in iter_events(run_dir, ROLLBACK))
    except KeyError as error:
        raise DataError(f"{run_dir / AUDIT_FILE}: an event `{ROLLBACK}` has no {error}. Remove that line.") from None
