"""One attempt to bring a run to its end: its preparation, a rank's work, the watch over all ranks, and the result."""

import gc
import logging
import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from launch.rank.failure import Failure
from launch.rank.place import Rank
from launch.rank.signals import HeartbeatBoard, StopSignal
from launch.supervision.hangs import Suspect, find_suspects, is_stuck, limit_seconds, save_stacks
from launch.supervision.restarts import AttemptEnd, newest_step
from llmtrain.config.launch import LaunchConfig
from llmtrain.config.schema import RunConfig
from llmtrain.errors import EXIT_PREEMPTED, LlmtrainError
from llmtrain.messages import show_messages
from llmtrain.runs.folder import RunFolder
from llmtrain.runs.status import read_status

_logger = logging.getLogger(__name__)

GRACE_SECONDS = 1.5
"""Time for ranks to end by themselves once one has failed; then they are killed."""

POLL_SECONDS = 0.25
"""Time between two looks at the ranks' progress. The end of a rank is heard at once."""


@dataclass(frozen=True)
class RankNews:
    """A rank's failure as it says it, or its end with the exit code; or both."""

    rank: int
    failure: Failure | None = None
    exit_code: int | None = None


class RankSet(Protocol):
    """All ranks of one attempt. Their positions are on the board that `watch` gets."""

    def news(self, running: Collection[int]) -> Sequence[RankNews]:
        """News of running ranks, as soon as there is some, or nothing after POLL_SECONDS."""
        ...

    def helpless(self, running: Collection[int]) -> Mapping[int, str]:
        """The ranks that can do nothing, each with the reason: their process is stopped, or cannot be reached."""
        ...

    def stacks(self, running: Collection[int]) -> dict[int, str]:
        """The stacks of the ranks' threads; empty for a rank that does not answer."""
        ...

    def host(self, rank: int) -> str:
        """The machine of a rank."""
        ...


@dataclass(frozen=True)
class Ending:
    """The end of the ranks: failures, ranks that had to be ended, and the stacks of hung ranks, by rank.

    `exit_code` is the highest of those that ended. `out_of_time` says that they were told to stop and took longer than
    their grace.
    """

    failures: tuple[Failure, ...] = ()
    stopped: tuple[int, ...] = ()
    stacks: dict[int, str] | None = None
    exit_code: int = 0
    out_of_time: bool = False


def watch(
    rank_set: RankSet,
    board: HeartbeatBoard,
    stop: StopSignal,
    limits: LaunchConfig,
    look: Callable[[], None] = lambda: None,
) -> Ending:
    """Wait until every rank has ended, or until they must be ended. `look` is called every POLL_SECONDS."""
    failures: dict[int, Failure] = {}
    running = set(range(board.world_size))
    exit_code = 0
    deadline = None  # of those that run on after a failure
    stop_by = None
    while running and (deadline is None or time.monotonic() < deadline):
        for news in rank_set.news(running):
            failure = news.failure
            if news.exit_code is not None:
                running.discard(news.rank)
                exit_code = max(exit_code, news.exit_code)
                if not failure and news.rank not in failures and news.exit_code not in (0, EXIT_PREEMPTED):
                    failure = Failure.of_exit(news.rank, news.exit_code, rank_set.host(news.rank))
            if failure:
                failures[news.rank] = failure
        look()
        now = time.monotonic()
        if failures and deadline is None:  # from the first failure on, however many follow
            deadline = now + GRACE_SECONDS
        if stop.requested and limits.grace_seconds > 0:
            stop_by = stop_by or now + limits.grace_seconds
            if now >= stop_by and running and not failures:
                return Ending(out_of_time=True)
        if not failures and running and is_stuck([board.positions()[rank] for rank in running], limits.watchdog, now):
            return _hung(rank_set, running, board, limits)
    for rank, reason in rank_set.helpless(running).items():
        # A stopped rank is the cause: the others have only noticed, by a time limit of their own.
        failures[rank] = _killed(rank, rank_set, reason)
    return Ending(tuple(failures.values()), tuple(sorted(running - failures.keys())), exit_code=exit_code)


def _hung(rank_set: RankSet, running: Collection[int], board: HeartbeatBoard, limits: LaunchConfig) -> Ending:
    """Find out which rank the others wait for, and what all of them are doing."""
    # Positions first, then stacks: asking for stacks takes a second, in which a rank may still move.
    positions = board.positions()
    helpless = rank_set.helpless(running)
    stacks = rank_set.stacks(running)
    suspects = find_suspects({rank: positions[rank] for rank in running}, helpless, stacks)
    failures = tuple(_killed(suspect.rank, rank_set, _text(suspect, limits)) for suspect in suspects)
    others = set(running) - {suspect.rank for suspect in suspects}
    return Ending(failures, tuple(sorted(others)), stacks)


def _killed(rank: int, rank_set: RankSet, text: str) -> Failure:
    """A failure that comes before what the others say."""
    return Failure(rank, 1, text, text, killed=True, host=rank_set.host(rank), seconds=0.0)


def _text(suspect: Suspect, limits: LaunchConfig) -> str:
    position = suspect.position
    seconds = limit_seconds(position, limits.watchdog)
    text = (
        f"no progress in section {position.phase} after step {position.step} for longer than "
        f"launch.watchdog.{position.phase}_seconds = {seconds:g}: {suspect.reason}"
    )
    return text + (f"; it is in {suspect.place}" if suspect.place else "")


if TYPE_CHECKING:
    from llmtrain.train.loop import Run

ChangeRun = Callable[["Run", Rank], "Run"]
"""Replaces parts of a run on a rank, as a drill does."""


def watches_speed(config: RunConfig) -> bool:
    """True where slow ranks are looked for. Nobody waits for a rank that is alone."""
    return config.observe.straggler_score > 0 and config.launch.num_workers > 1


def import_for_ranks(engine: str) -> None:
    """Import all that ranks need, in the process that they will be forked from. No GPU may be in use there."""
    import torch
    import torch._dynamo  # else each rank's optimizer imports it in its first step, for seconds

    import launch.rank.worker
    import launch.supervision.work_meter
    from llmtrain.train.setup import engine_class

    assert launch.rank.worker and launch.supervision.work_meter and torch._dynamo
    # Asked through the driver's library, a GPU is not initialized by the question: the forked ranks can be.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    engine_class(engine)
    assert not torch.cuda.is_initialized(), "a GPU cannot be used after a fork"
    gc.freeze()  # ranks' garbage collections pass over what is imported: half a second each, and a copy of its pages


def rank_work(
    config: RunConfig,
    stop: StopSignal,
    place: Rank,
    board: HeartbeatBoard,
    slot: int,
    change_run: ChangeRun | None = None,
) -> Callable[[], int]:
    """The work of a forked rank, which returns the exit code. Its heartbeats go to this slot of the board.

    It reads the data's manifests itself: they may have changed since the launcher did, or since the last attempt.
    """
    from launch.rank.worker import run_worker
    from llmtrain.preflight.resolve import resolve

    def work() -> int:
        show_messages(place.rank)
        heartbeat = board.heartbeat(slot)
        if watches_speed(config):
            from launch.supervision.work_meter import WorkMeter

            heartbeat = WorkMeter(heartbeat, partial(board.add_window, slot), partial(board.places_wanted, slot))
        return run_worker(resolve(config), stop, place, heartbeat, change_run)

    return work


def sum_up(config: RunConfig, ending: Ending, board: HeartbeatBoard, stop: StopSignal) -> AttemptEnd:
    """The result of an attempt, none of its ranks being left: for `supervise`, and on storage."""
    run_dir = config.run_dir
    if ending.stacks is not None:
        save_stacks(ending.stacks, run_dir)
    if ending.out_of_time:
        _abandon_save(config, run_dir)
    positions = board.positions()
    return AttemptEnd(
        exit_code=EXIT_PREEMPTED if ending.out_of_time else ending.exit_code,
        failures=ending.failures,
        stopped=ending.stopped,
        saved_step=newest_step(run_dir),
        step=max(position.step for position in positions),
        worked=any(position.step > position.first_step for position in positions),
        told_to_stop=stop.requested,
    )


def note_stop(config: RunConfig, launch_id: str) -> None:
    """Say in status.json that a run was told to stop while none of its ranks was there to say it."""
    run_dir = config.run_dir
    with suppress(LlmtrainError, OSError):
        before = read_status(run_dir)
        if before is not None:
            with RunFolder(run_dir, before.attempt, launch_id) as folder:
                message = "told to stop; the same command continues"
                folder.write_status("preempted", before.step, config.train.steps or before.total_steps, message)


def _abandon_save(config: RunConfig, run_dir: Path) -> None:
    """Leave nothing of a save that took longer than there was time for; the checkpoints before it stay."""
    from llmtrain.checkpoint.folders import CHECKPOINTS
    from llmtrain.checkpoint.writer import recover

    message = f"told to stop; not saved within launch.grace_seconds = {config.launch.grace_seconds:g}"
    _logger.info("%s: it continues from step %d", message, newest_step(run_dir))
    with suppress(LlmtrainError, OSError), RunFolder(run_dir) as folder:
        recover(run_dir / CHECKPOINTS)
        before = read_status(run_dir)
        total_steps = config.train.steps or (before.total_steps if before else config.total_steps)
        folder.write_status("preempted", newest_step(run_dir), total_steps, message)
