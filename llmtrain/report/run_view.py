"""A run as it is seen from outside, from its folder alone: how far it is, and whether its process still lives."""

import math
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from llmtrain.checkpoint.folders import CHECKPOINTS, checkpoint_steps, step_folder_name
from llmtrain.errors import ConfigError, DataError
from llmtrain.report.efficiency import STARTED
from llmtrain.runs.audit import iter_events
from llmtrain.runs.folder import LEASE_SECONDS, LOCK, LockOwner, process_start, read_owner, this_machine
from llmtrain.runs.metrics_file import METRICS_FILE, NewestRows, newest_rows
from llmtrain.runs.status import STATUS, RunStatus, read_status
from llmtrain.words import duration

State = Literal[
    "starting", "running", "restarting", "done", "preempted", "failed", "stalled", "dead", "unknown", "damaged"
]
"""The state of a run: its recorded status, or `dead` where that says that it goes on and its process is gone,
`starting` where nothing is recorded yet, `unknown` where nothing can be told, `damaged` where a file cannot be read."""

OVER: tuple[State, ...] = ("done", "failed", "stalled", "dead", "unknown", "damaged")
"""States that nobody but a person changes. A preempted run is one that somebody starts again."""

WATCH_SECONDS = 2.0
RATE_ROWS = 100
"""Rows that rates are means over."""


@dataclass(frozen=True)
class RunView:
    """A run at one moment. Ages are in seconds; what is not known is None, and texts may be empty.

    `alive` tells of the process that trains, or that starts the ranks again. `attempt` counts all starts of the run,
    from 1; `since` is the ISO time of the last one.
    """

    run: str
    path: str
    state: State
    alive: bool | None = None
    step: int | None = None
    total_steps: int | None = None
    loss: float | None = None
    valid_loss: float | None = None
    tokens_per_second: float | None = None
    seconds_left: float | None = None
    last_row_age_seconds: float | None = None
    attempt: int | None = None
    since: str = ""
    updated: str = ""
    host: str = ""
    pid: int | None = None
    cause: str = ""
    verdict: str = ""
    message: str = ""
    next_action: str = ""
    checkpoint: str = ""
    checkpoint_step: int | None = None
    checkpoint_age_seconds: float | None = None


def find_runs(path: Path) -> list[Path]:
    """The run that a path is, or the runs in it, by name. Raises ConfigError where there is none."""
    if is_run(path):
        return [path]
    runs = sorted(entry for entry in path.iterdir() if _is_open_run(entry)) if path.is_dir() else []
    if not runs:
        missing = "no run is in it" if path.is_dir() else "it is not a folder"
        raise ConfigError(f"{path}: {missing}. Give the folder of a run, <output_dir>/<name>, or one that holds runs.")
    return runs


def is_run(path: Path) -> bool:
    """True where a folder is one that `llmtrain train` writes to."""
    return path.is_dir() and any((path / name).is_file() for name in (STATUS, METRICS_FILE, LOCK))


def _is_open_run(path: Path) -> bool:
    """True where a folder beside others is a run that one may look at."""
    try:
        return is_run(path)
    except PermissionError:
        return False


def look(path: Path) -> RunView:
    """The view of a run folder now. Raises LlmtrainError where a file in it cannot be understood."""
    name = path.resolve().name
    state: State
    status = read_status(path)
    try:
        owner = read_owner(path / LOCK)
    except OSError as error:
        raise DataError(f"{path / LOCK}: {error.strerror}. If no process trains in this folder, remove it.") from None
    if status is None:
        held = owner is not None and holder_lives(path / LOCK, owner)
        state = "starting" if held else "unknown"
        cause = "" if held else f"{path / STATUS}: there is no such file"
        return RunView(name, str(path), state, alive=held or None, cause=cause, **_newest_checkpoint(path))
    alive = _lives(path, status, owner)
    state = "dead" if alive is False else status.status
    starts = list(iter_events(path, STARTED))
    # Until a start has made a step, rows of steps after the one that it continues are of the start before it.
    begins = status.status == "running" and status.message == "starting"
    gone_back_to = status.step if begins else None
    facts: dict[str, Any] = {
        "attempt": len(starts) or status.attempt + 1,
        "since": starts[-1]["time"] if starts else "",
        **_newest_checkpoint(path),
        **_progress(newest_rows(path / METRICS_FILE, RATE_ROWS, gone_back_to), status, state),
    }
    message, action = status.message, status.next_action
    if state == "dead":
        message, action = _last_words(path, status, facts["checkpoint_step"])
    return RunView(
        run=name,
        path=str(path),
        state=state,
        alive=alive,
        total_steps=status.total_steps,
        updated=status.updated,
        host=owner.host if owner else status.host,
        pid=owner.pid if owner else status.pid,
        cause=status.cause,
        verdict=status.verdict,
        message=message,
        next_action=action,
        **facts,
    )


def holder_lives(lock: Path, owner: LockOwner) -> bool:
    """True where the process that holds a run folder lives: exactly on its own machine, elsewhere by its lease."""
    if owner.machine == this_machine() and owner.host == socket.gethostname():
        return process_start(owner.pid) in (owner.process_started, "")
    return _age(lock) < LEASE_SECONDS


def _lives(path: Path, status: RunStatus, owner: LockOwner | None) -> bool | None:
    """True where a run that is said to go on has a process; None where that cannot be told, or where it has ended."""
    if status.status not in ("running", "restarting"):
        return None
    if owner is not None:
        return holder_lives(path / LOCK, owner)
    if status.status == "running":
        return False
    # Between two attempts the launcher holds no lock.
    return process_start(status.pid) is not None if status.host == socket.gethostname() else None


def _last_words(path: Path, status: RunStatus, saved_step: int | None) -> tuple[str, str]:
    """(message, next action) for a run whose process has gone without a word."""
    here = status.host == socket.gethostname()
    where = f"process {status.pid} on {'this host' if here else status.host}"
    gone = f"{where} is gone" if here else f"{where} has given no sign of life for {duration(_age(path / LOCK))}"
    said = f"{gone}, though the run was {status.status}"
    from_step = f"step {saved_step}" if saved_step else "the beginning"
    return said, f"start the same command again: it continues from {from_step}"


def _progress(rows: NewestRows, status: RunStatus, state: State) -> dict[str, Any]:
    valid = _number(rows.evaluation["valid_loss"]) if rows.evaluation else None
    if not rows.training:
        return {"step": status.step, "valid_loss": valid}
    counted, last = rows.training, rows.training[-1]
    # The status follows the rows once a second. After a restart it is the rows that are old.
    fresh = last["time"] >= datetime.fromisoformat(status.updated).timestamp() - 2.0
    step = max(status.step, last["step"]) if fresh else status.step
    between = counted[-1]["step"] - counted[0]["step"]
    seconds = (last["time"] - counted[0]["time"]) / between if between else last["step_seconds"]
    # Until a start has made a step, the rows are those of the one before it, and say nothing of its pace.
    going_on = state in ("running", "starting") and status.message != "starting"
    return {
        "step": step,
        "loss": _number(last["loss"]),
        "valid_loss": valid,
        "tokens_per_second": sum(row["tokens_per_second"] for row in counted) / len(counted),
        "seconds_left": seconds * (status.total_steps - step) if going_on else None,
        "last_row_age_seconds": max(0.0, time.time() - last["time"]),
    }


def _newest_checkpoint(path: Path) -> dict[str, Any]:
    step = next(iter(checkpoint_steps(path / CHECKPOINTS)), None)
    if step is None:
        return {"checkpoint_step": None}
    folder = path / CHECKPOINTS / step_folder_name(step)
    return {"checkpoint": str(folder), "checkpoint_step": step, "checkpoint_age_seconds": _age(folder)}


def _age(path: Path) -> float:
    """Seconds since a file was changed; 0 where it has vanished meanwhile."""
    try:
        return max(0.0, time.time() - path.stat().st_mtime)
    except OSError:
        return 0.0


def _number(value: Any) -> float | None:
    """A number of a row; None where it is not finite, which JSON has no number for."""
    return float(value) if math.isfinite(value) else None


def iter_views(folders: Sequence[Path], again: bool) -> Iterator[list[RunView]]:
    """Views of the runs, over and over. A process that is gone once may be one that is being replaced."""
    before: set[str] = set()
    while True:
        views = [_look(folder) for folder in folders]
        dead = {view.path for view in views if view.state == "dead"}
        if again and dead - before:
            before = dead
            time.sleep(WATCH_SECONDS)
            continue
        yield views
        if not again:
            return
        before = dead
        time.sleep(WATCH_SECONDS)


def _look(folder: Path) -> RunView:
    try:
        return look(folder)
    except DataError as error:
        return RunView(folder.resolve().name, str(folder), "damaged", cause=str(error))
