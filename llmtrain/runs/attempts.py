"""The attempts of a run: every time that it is started, by a person, a scheduler or a launcher after a failure."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from llmtrain.runs.audit import iter_events, record

STARTED = "started"
"""The audit log's event of every start of the ranks, the first included.

`step` is the one that it continues after, `workers` the number of ranks, `number` counts from 1; `data` has one object
for each source: its tokens, those that no sample holds, and how often the run goes through it.
"""


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
    run_id = next((event["run_id"] for event in earlier if "run_id" in event), None) or _new_id(run_dir)
    with suppress(OSError):
        record(run_dir, STARTED, step=step, workers=workers, number=number, run_id=run_id, data=data)
    return StartedAttempt(number, run_id, step)


def _new_id(run_dir: Path) -> str:
    """A short text that no other run folder has: by its place and the time."""
    where = f"{run_dir.resolve()} {run_dir.stat().st_ctime_ns}"
    return blake2b(where.encode(), digest_size=4).hexdigest()
