"""Watching over the ranks of one attempt, wherever they run: how they end, and when they must be ended."""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from launch.rank.failure import Failure
from launch.rank.heartbeat import HeartbeatBoard
from launch.rank.stop import StopSignal
from launch.supervision.hangs import Suspect, find_suspects, is_stuck, limit_seconds
from llmtrain.config.launch import LaunchConfig
from llmtrain.errors import EXIT_PREEMPTED

GRACE_SECONDS = 1.5
"""How long ranks may take to end by themselves once one has failed; then they are killed."""

POLL_SECONDS = 0.25
"""How often it is looked whether the ranks make progress. That one has ended is heard at once."""


@dataclass(frozen=True)
class RankNews:
    """What a rank said of its failure, or that it has ended, with which exit code; or both."""

    rank: int
    failure: Failure | None = None
    exit_code: int | None = None


class RankSet(Protocol):
    """All ranks of one attempt. Their positions are on the board that `watch` gets."""

    def news(self, running: Collection[int]) -> Sequence[RankNews]:
        """What running ranks have to say, as soon as there is something, or nothing after POLL_SECONDS."""
        ...

    def helpless(self, running: Collection[int]) -> Mapping[int, str]:
        """The ranks that can do nothing, each with the reason: their process is stopped, or cannot be reached."""
        ...

    def stacks(self, running: Collection[int]) -> dict[int, str]:
        """What the threads of the ranks are doing; empty for one that does not say."""
        ...

    def host(self, rank: int) -> str:
        """The machine of a rank."""
        ...


@dataclass(frozen=True)
class Ending:
    """How the ranks have ended: failures, ranks that had to be ended, and what hung ranks were doing, by rank.

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
    """Wait until every rank has ended, or until it is known that they must be ended. `look` is called now and then."""
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
        if failures and deadline is None:
            deadline = now + GRACE_SECONDS
        if stop.requested and limits.grace_seconds > 0:
            stop_by = stop_by or now + limits.grace_seconds
            if now >= stop_by and running and not failures:
                return Ending(out_of_time=True)
        if not failures and running and is_stuck([board.positions()[rank] for rank in running], limits.watchdog, now):
            return _hung(rank_set, running, board, limits)
    for rank, reason in rank_set.helpless(running).items():
        # The others only noticed, by a time limit of their own.
        failures[rank] = _killed(rank, rank_set, reason)
    return Ending(tuple(failures.values()), tuple(sorted(running - failures.keys())), exit_code=exit_code)


def _hung(rank_set: RankSet, running: Collection[int], board: HeartbeatBoard, limits: LaunchConfig) -> Ending:
    """Find out which rank the others wait for, and what all of them are doing."""
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
