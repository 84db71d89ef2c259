"""audit.jsonl: what was decided about a run and why, one JSON object per line, on the disk before it takes effect.

Events and their facts are listed in docs/operations/. Every line has `time` (ISO, UTC) and `event`. Whoever decides
appends: rank 0 while it trains, the launcher between attempts.
"""

import os
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from llmtrain.errors import DataError
from llmtrain.files import iter_lines, open_regular, parse_line, sealed_line

AUDIT_FILE = "audit.jsonl"

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
    """What is wrong with a line of the log; None where it is an event."""
    if not isinstance(row, dict) or not isinstance(row.get("event"), str):
        return "no text `event`"
    try:
        if datetime.fromisoformat(row["time"]).utcoffset() is None:
            return "`time` without a zone"
    except (KeyError, TypeError, ValueError):
        return "no ISO `time`"
    wrong = [key for key in NUMBERS if not isinstance(row.get(key, 0), int) or abs(row.get(key, 0)) > MOST]
    return f"no whole number `{wrong[0]}`" if wrong else None
