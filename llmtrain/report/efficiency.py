"""Effective training time: the share of a run's time that went into steps that count. Pure.

The ratio (ETTR) is: seconds in steps that count / seconds from the run's first start to its last recorded row.

- A **step that counts** is one whose row was not replaced by a later one. Steps that were done and then left behind,
  because the run started again from an older checkpoint or rolled back, are **lost**.
- **Seconds in a step** are its `step_seconds`: waiting for its batch, computing, and the wait for the loss. Evaluation
  and the stall of a checkpoint do not belong to it.
- **The first start** is the first `started` event, or where a run folder has none, the start of the first recorded
  step; **the last row** is one of training or evaluation. All between them counts: starting up, hanging, being stopped,
  waiting in a queue until somebody starts the run again. But not the time after the run was done, until somebody asked
  it for more steps (event `done`): nothing was left to do in it.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from llmtrain.runs.audit import STARTED, iter_events
from llmtrain.runs.metrics_file import METRICS_FILE, iter_rows
from llmtrain.values.progress import RESUMED_FROM, TASK_SECONDS
from llmtrain.words import duration

DONE = "done"
"""The event of a run that has made all its steps; `step` is the last one."""

STOPPED_EARLY = "stopped_early"
"""The event of a run that has ended before its last step, for a `reason` of its own; `step` is the one it has made."""

ENDS = ("restarting", "failed", "stalled")
"""Events of an attempt that failed; `step` is the last one that any of its ranks finished."""


@dataclass(frozen=True)
class Efficiency:
    """The time of a run by its uses, in seconds, and the steps that were done for nothing.

    `down_seconds` is the time between the last row before a start and that start: hanging, stopped, queued. `starts`
    counts every start of the ranks, `extensions` those of a run that was done before. `lost_steps` were finished and do
    not count; some of them may have left no row.
    """

    wall_seconds: float = 0.0
    step_seconds: float = 0.0
    lost_seconds: float = 0.0
    evaluate_seconds: float = 0.0
    checkpoint_seconds: float = 0.0
    down_seconds: float = 0.0
    starts: int = 0
    extensions: int = 0
    lost_steps: int = 0
    rollbacks: int = 0
    resizes: int = 0
    stragglers: int = 0

    @property
    def ratio(self) -> float | None:
        """The share of the time in steps that count; None where no time is known."""
        return min(1.0, self.step_seconds / self.wall_seconds) if self.wall_seconds > 0 else None

    @property
    def restarts(self) -> int:
        return max(0, self.starts - 1 - self.extensions)

    @property
    def other_seconds(self) -> float:
        """Starting up, compiling, restoring, recording."""
        known = self.step_seconds + self.lost_seconds + self.evaluate_seconds
        return max(0.0, self.wall_seconds - known - self.checkpoint_seconds - self.down_seconds)

    def __str__(self) -> str:
        """One line for the end of a run."""
        if self.ratio is None:
            return "effective training time unknown: no recorded step has a time"
        counts = [
            f"{number:,} {singular if number == 1 else plural}"
            for number, singular, plural in (
                (self.restarts, "restart", "restarts"),
                (self.extensions, "extension", "extensions"),
                (self.lost_steps, "lost step", "lost steps"),
                (self.rollbacks, "rollback", "rollbacks"),
                (self.resizes, "change of size", "changes of size"),
                (self.stragglers, "slow rank", "slow ranks"),
            )
            if number
        ]
        share = f"effective training time {self.ratio:.1%} of {duration(self.wall_seconds)}"
        return f"{share}: {', '.join(counts) or 'no restart, no lost step'}"


@dataclass
class _Steps:
    """Recorded stretches of steps that count so far: (steps before it, its last step, seconds of one step)."""

    stretches: list[tuple[int, int, float]] = field(default_factory=list)
    reached: int = 0
    lost_steps: int = 0
    lost_seconds: float = 0.0

    def go_back(self, step: int) -> None:
        """The steps after `step` do not count."""
        while self.stretches and self.stretches[-1][1] > step:
            before, last, seconds = self.stretches.pop()
            kept = max(before, step)
            self.lost_seconds += (last - kept) * seconds
            if kept > before:
                self.stretches.append((before, kept, seconds))
        self.lost_steps += max(0, self.reached - step)
        self.reached = step

    def add(self, step: int, seconds: float) -> float:
        """Steps up to `step` are done, each in so many seconds; returns how long they took in all."""
        if self.stretches and step <= self.stretches[-1][1]:
            self.go_back(step - 1)  # rows of old files do not say that they go back
        before, self.reached = min(self.reached, step), step
        self.stretches.append((before, step, seconds))
        return (step - before) * seconds

    @property
    def seconds(self) -> float:
        return sum((last - before) * seconds for before, last, seconds in self.stretches)


def measure(rows: Iterable[Mapping[str, Any]], events: Iterable[Mapping[str, Any]]) -> Efficiency:
    """Account for the time of a run from every row ever written, replaced ones included, and its audit log."""
    timed = [row for row in rows if isinstance(row.get("time"), int | float)]
    happened = [(event_time(event), event) for event in events]
    counts = {name: sum(event["event"] == name for _, event in happened) for name in ("rollback", "resized")}
    starts = [time for time, event in happened if event["event"] == STARTED]
    slow = {(event.get("rank"), event.get("step")) for _, event in happened if event["event"] == "straggler"}
    steps = _Steps()
    evaluating = saving = down = idle = 0.0
    extensions, is_done = 0, False
    began = ended = starts[0] if starts else None
    # Rows come first among equal times (the sort is stable): an event ends what was recorded up to it.
    merged = sorted([*((row["time"], row) for row in timed), *happened], key=lambda pair: pair[0])
    for time, entry in merged:
        if entry.get("event") == STARTED:
            waited = time - ended if ended is not None else 0.0
            down, idle = (down, idle + waited) if is_done else (down + waited, idle)
            extensions, is_done, ended = extensions + is_done, False, time
            steps.go_back(min(steps.reached, entry.get("step", 0)))
        elif entry.get("event") in (DONE, STOPPED_EARLY):
            is_done = True
        elif entry.get("event") in ENDS:
            # Rows are not written for every step, and the last ones of a killed process may be missing.
            steps.reached = max(steps.reached, entry.get("step", 0))
        if "event" in entry:
            continue
        if RESUMED_FROM in entry:
            steps.go_back(entry[RESUMED_FROM])
        took = steps.add(entry["step"], entry.get("step_seconds", 0.0)) if "loss" in entry else 0.0
        evaluating += entry.get("valid_seconds", 0.0) + entry.get(TASK_SECONDS, 0.0)
        saving += entry.get("checkpoint_seconds", 0.0)
        began = time - took if began is None else began
        ended = time
    return Efficiency(
        wall_seconds=ended - began - idle if timed and began is not None and ended is not None else 0.0,
        step_seconds=steps.seconds,
        lost_seconds=steps.lost_seconds,
        evaluate_seconds=evaluating,
        checkpoint_seconds=saving,
        down_seconds=down,
        starts=max(len(starts), 1),
        extensions=extensions,
        lost_steps=steps.lost_steps,
        rollbacks=counts["rollback"],
        resizes=counts["resized"],
        stragglers=len(slow),
    )


def run_efficiency(run_dir: Path) -> Efficiency:
    """The efficiency of the run in a folder. Raises DataError where its metrics or audit log are damaged, OSError."""
    metrics = run_dir / METRICS_FILE
    return measure(iter_rows(metrics) if metrics.exists() else (), iter_events(run_dir))


def event_time(event: Mapping[str, Any]) -> float:
    """Seconds since 1970 of an event of the audit log."""
    return datetime.fromisoformat(event["time"]).timestamp()
