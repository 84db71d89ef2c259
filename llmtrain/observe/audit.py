"""audit.jsonl: what was decided about a run and why, one JSON object per line, on the disk before it takes effect.

Events and their facts are listed in docs/operations/. Every line has `time` (ISO, UTC) and `event`. Whoever decides
appends: rank 0 while it trains, the launcher between attempts.
"""

import json
import os
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from llmtrain.errors import DataError

AUDIT_FILE = "audit.jsonl"


def record(run_dir: Path, event: str, **facts: Any) -> None:
    """Append one event to the run's audit log, durably. Facts are JSON without NaN. Raises OSError."""
    line = json.dumps(
        {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": event, **facts}, allow_nan=False
    )
    with (run_dir / AUDIT_FILE).open("ab+") as file:
        # A line that a crash has torn gets its end here: it spoils itself only.
        if file.tell() and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n":
            file.write(b"\n")
        file.write(line.encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def iter_events(run_dir: Path, *events: str) -> Iterator[dict[str, Any]]:
    """The recorded events, oldest first; all kinds, or those named. A torn line is left out.

    Raises DataError where the file holds something else than events.
    """
    path = run_dir / AUDIT_FILE
    if not path.exists():
        return
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if not isinstance(row, dict) or "event" not in row:
            raise DataError(f"{path}:{number}: not an event of a run: {line[:80]!r}. Remove that line.")
        if not events or row["event"] in events:
            yield row
