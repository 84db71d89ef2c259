"""Restarts after an attempt's end, the same in every launcher. Decisions are pure; `supervise` carries them out."""

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Literal

from launch.rank.failure import Failure, failure_text, first_cause
from llmtrain.checkpoint.folders import CHECKPOINTS, checkpoint_steps
from llmtrain.config.schema import RunConfig
from llmtrain.errors import EXIT_PREEMPTED, EXIT_TOLD_TWICE, LlmtrainError, NoProgressError, RunFolderInUseError
from llmtrain.report.efficiency import run_efficiency
from llmtrain.runs.audit import iter_events, record
from llmtrain.runs.folder import RunFolder, Status, read_status
from llmtrain.runs.rank_logs import log_path

_logger = logging.getLogger(__name__)

EXIT_NO_PROGRESS = NoProgressError.exit_code


@dataclass(frozen=True)
class AttemptEnd:
    """The end of an attempt, as its launcher saw it.

    `saved_step` is the newest checkpoint's afterwards, `step` the last step that any rank finished. `worked` says that
    this attempt finished a step. `stopped` are ranks that had to be ended; `told_to_stop` says that the end was wanted,
    `resized` that the launcher wanted it, to go on with another number of ranks.
    """

    exit_code: int
    failures: tuple[Failure, ...] = ()
    stopped: tuple[int, ...] = ()
    saved_step: int = 0
    step: int = 0
    worked: bool = False
    told_to_stop: bool = False
    resized: bool = False

    @property
    def cause(self) -> Failure:
        """The failure that explains the others. Only where there is one."""
        return first_cause(self.failures)


@dataclass(frozen=True)
class Decision:
    """The next action: start all ranks again, or end with an exit code."""

    action: Literal["restart", "stop"]
    exit_code: int = 0
    reason: str = ""


def decide(
    attempts: Sequence[AttemptEnd], max_stalled_attempts: int, saved_before: int = 0, stops_before: int = 0
) -> Decision:
    """The decision after the last attempt of this launch; `saved_before` is the newest step saved before the first.

    A run is started again from its newest valid checkpoint, unless it was told to stop, a person must mend something,
    nothing has ever worked, or attempts end again and again without a newer checkpoint. Where it was told to stop and
    would have been started again, whoever told it does that: the exit code asks for it. Not for ever: `stops_before`
    launches in a row have already ended so, and none saved anything.
    """
    end = attempts[-1]
    if not end.failures:
        return Decision("restart") if end.resized else Decision("stop", end.exit_code)
    if end.cause.exit_code == EXIT_TOLD_TWICE:
        return Decision("stop", EXIT_TOLD_TWICE, "told to stop")
    decision = _after_failure(attempts, max_stalled_attempts, saved_before)
    if decision.action == "restart" and end.told_to_stop:
        stalled = num_stalled(attempts, saved_before)
        if stalled == len(attempts) and stalled + stops_before >= max_stalled_attempts:
            return Decision("stop", EXIT_NO_PROGRESS, _no_progress(stalled + stops_before, max_stalled_attempts))
        return Decision("stop", EXIT_PREEMPTED, "told to stop")
    return decision


def _after_failure(attempts: Sequence[AttemptEnd], max_stalled_attempts: int, saved_before: int) -> Decision:
    """The decision where nobody has told the run to stop."""
    cause = attempts[-1].cause
    # The order matters: a fault that a person must mend ends the run however far it got, and killed ranks are started
    # again although no step was finished, because whoever killed them may kill before the first one.
    if cause.lasting or not cause.is_defect:
        return Decision("stop", cause.exit_code, "starting again would not mend it")
    if max_stalled_attempts == 0:
        return Decision("stop", cause.exit_code, "launch.max_stalled_attempts = 0")
    if not cause.killed and not any(attempt.worked for attempt in attempts):
        return Decision("stop", cause.exit_code, "no step was ever finished")
    stalled = num_stalled(attempts, saved_before)
    if stalled >= max_stalled_attempts:
        return Decision("stop", EXIT_NO_PROGRESS, _no_progress(stalled, max_stalled_attempts))
    return Decision("restart")


def _no_progress(stalled: int, max_stalled_attempts: int) -> str:
    times = f"{stalled} attempts in a row ended" if stalled > 1 else "an attempt ended"
    return f"{times} without a newer checkpoint (launch.max_stalled_attempts = {max_stalled_attempts})"


def stops_without_save(run_dir: Path, saved_step: int) -> int:
    """The number of launches in a row, up to now, that were told to stop, failed, and left this newest checkpoint.

    A defect in a run's last save would otherwise have it requeued for ever.
    """
    with suppress(LlmtrainError, OSError):
        newest_first = reversed(list(iter_events(run_dir, "preempted")))
        return sum(1 for _ in takewhile(lambda event: event.get("saved_step") == saved_step, newest_first))
    return 0


def num_stalled(attempts: Sequence[AttemptEnd], saved_before: int = 0) -> int:
    """The number of last attempts that have ended without a checkpoint newer than any before."""
    newest, stalled = saved_before, 0
    for attempt in attempts:
        if not attempt.resized or attempt.failures:  # growing or shrinking is not a failure to get on
            stalled = 0 if attempt.saved_step > newest else stalled + 1
        newest = max(newest, attempt.saved_step)
    return stalled


def newest_step(run_dir: Path) -> int:
    """The step of the newest checkpoint of a run, by its name; 0 where there is none."""
    return next(iter(checkpoint_steps(run_dir / CHECKPOINTS)), 0)


def supervise(config: RunConfig, run_attempt: Callable[[int], AttemptEnd], launch_id: str = "") -> int:
    """Run attempts until the run ends; returns its exit code.

    `run_attempt(number)` starts all ranks, from the newest valid checkpoint, and returns once none of them is left.
    `launch_id` is that of the ranks, see `Rank`.
    """
    run_dir = config.run_dir
    saved_before = newest_step(run_dir)
    stops_before = stops_without_save(run_dir, saved_before)
    attempts: list[AttemptEnd] = []
    while True:
        end = run_attempt(len(attempts))
        attempts.append(end)
        decision = decide(attempts, config.launch.max_stalled_attempts, saved_before, stops_before)
        if end.failures:
            _tell(config, end, decision, len(attempts) - 1, launch_id)
        if decision.action == "stop":
            return decision.exit_code


def _tell(config: RunConfig, end: AttemptEnd, decision: Decision, attempt: int, launch_id: str) -> None:
    """Tell the failure and the decision: at the terminal, in status.json and in the audit log."""
    cause = end.cause
    if cause.exit_code == EXIT_TOLD_TWICE:
        return
    run_dir = config.run_dir
    log = log_path(run_dir, cause.rank)
    has_log = bool(cause.place) and cause.is_defect and log.exists()
    alone = config.launch.num_workers == 1
    lines = [failure_text(end.failures, end.stopped, str(log) if has_log else "", alone)]
    status: Status = "failed"
    if decision.action == "restart":
        status = "restarting"
        lines.append(f"starting again (attempt {attempt + 2}), from {_starting_point(end.saved_step)}")
    elif decision.exit_code == EXIT_NO_PROGRESS:
        status = "stalled"
        lines.append(f"given up: {decision.reason}. Mend the cause, then start the same command again.")
    elif decision.exit_code == EXIT_PREEMPTED:
        status = "preempted"
        lines.append(f"told to stop, and not saved: the same command continues from {_starting_point(end.saved_step)}")
    if decision.action == "stop" and cause.is_defect:
        with suppress(LlmtrainError, OSError):
            lines.append(str(run_efficiency(run_dir)))
    _logger.error("%s", "\n".join(lines))
    text = ": ".join(part for part in (cause.place, cause.summary) if part)
    place = {"rank": cause.rank, "host": cause.host} if cause.place else {}
    facts = {**place, "cause": cause.summary, "attempt": attempt, "step": end.step}
    # A folder that cannot be written, or is somebody else's, must not hide the failure itself.
    with suppress(LlmtrainError, OSError):
        before = read_status(run_dir)
        if before is None or cause.exit_code == RunFolderInUseError.exit_code:
            return
        with RunFolder(run_dir, attempt, launch_id) as folder:
            message = decision.reason if status == "stalled" else text
            total_steps = config.train.steps or before.total_steps
            folder.write_status(status, max(end.step, before.step), total_steps, message, text)
            record(run_dir, status, saved_step=end.saved_step, **facts)


def _starting_point(saved_step: int) -> str:
    return f"the checkpoint of step {saved_step}" if saved_step else "the beginning"
