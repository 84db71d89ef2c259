"""Ranks as forked processes: starting them, watching over them, ending them."""

import ctypes
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

from launch.failure import Failure
from launch.pulse import PulseBoard
from launch.rank import Rank
from launch.stop import StopSignal
from launch.watchdog import (
    Suspect,
    dump_on_signal,
    find_suspects,
    is_stuck,
    limit_seconds,
    read_stacks,
    stopped_processes,
)
from llmtrain.config.launch import LaunchConfig
from llmtrain.errors import EXIT_PREEMPTED

GRACE_SECONDS = 1.5
"""How long ranks may take to end by themselves once one has failed; then they are killed."""

POLL_SECONDS = 0.25
"""How often it is looked whether the ranks make progress. That one has ended is heard at once."""

PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True)
class RankProcess:
    """A forked rank, the pipe through which it says why it failed, and the one through which it says where it is."""

    rank: int
    process: BaseProcess
    told: Connection
    stacks: Connection

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def end(self) -> None:
        """End what still runs. TERM would mean: save first."""
        if self.process.is_alive():
            self.process.kill()
        self.process.join()
        self.told.close()
        self.stacks.close()


@dataclass(frozen=True)
class Ending:
    """How the ranks have ended: failures, ranks that had to be ended, and what hung ranks were doing, by rank.

    `out_of_time` says that they were told to stop and took longer than their grace.
    """

    failures: tuple[Failure, ...] = ()
    stopped: tuple[int, ...] = ()
    stacks: dict[int, str] | None = None
    out_of_time: bool = False


def start_rank(place: Rank, stop: StopSignal, listener: socket.socket, work: Callable[[], int]) -> RankProcess:
    """Fork one rank, whose exit code is what `work` returns."""
    told, telling = _pipe()
    stacks, dumping = _pipe()
    launcher = os.getpid()

    def life() -> None:
        """Never returns: nothing of the launcher's own ending may run in a rank."""
        listener.close()
        die_with(launcher)
        dump_on_signal(dumping.fileno())
        stop.announces = False  # the launcher says it
        try:
            code = work()
        except BaseException as error:
            failure = Failure.of_error(place.rank, error)
            telling.send_bytes(failure.to_bytes())
            code = failure.exit_code
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    process = multiprocessing.get_context("fork").Process(target=life, name=f"rank-{place.rank}")
    process.start()
    telling.close()
    dumping.close()
    return RankProcess(place.rank, process, told, stacks)


def watch(
    ranks: Sequence[RankProcess],
    board: PulseBoard,
    stop: StopSignal,
    limits: LaunchConfig,
    look: Callable[[], None] = lambda: None,
) -> Ending:
    """Wait until every rank has ended, or until it is known that they must be ended. `look` is called now and then."""
    failures: dict[int, Failure] = {}
    running = {rank.rank: rank for rank in ranks}
    deadline = None  # of those that run on after a failure
    stop_by = None
    while running and (deadline is None or time.monotonic() < deadline):
        for rank in _wait_for_news(list(running.values())):
            if rank.process.exitcode is None:
                failure = hear_failure(rank)
            else:
                # What it said last may still be in the pipe.
                failure = None if rank.told.closed else hear_failure(rank)
                del running[rank.rank]
                if failure is None and rank.rank not in failures and rank.process.exitcode not in (0, EXIT_PREEMPTED):
                    failure = Failure.of_exit(rank.rank, rank.process.exitcode)
            if failure:
                failures[rank.rank] = failure
        look()
        now = time.monotonic()
        if failures and deadline is None:
            deadline = now + GRACE_SECONDS
        if stop.requested and limits.grace_seconds > 0:
            stop_by = stop_by or now + limits.grace_seconds
            if now >= stop_by and running and not failures:
                return Ending(out_of_time=True)
        if not failures and running and is_stuck([board.positions()[rank] for rank in running], limits.watchdog, now):
            return _hung(list(running.values()), board, limits)
    for rank in stopped_processes({rank: process.pid for rank, process in running.items()}):
        # The others only noticed, by a time limit of their own.
        text = "its process is stopped (SIGSTOP)"
        failures[rank] = Failure(rank, 1, text, text, killed=True, seconds=0.0)
    return Ending(tuple(failures.values()), tuple(sorted(running.keys() - failures.keys())))


def hear_failure(rank: RankProcess) -> Failure | None:
    """What a rank says of its failure; None where it has ended without a word."""
    try:
        return Failure.from_bytes(rank.told.recv_bytes())
    except EOFError:
        rank.told.close()
        return None


def die_with(launcher: int) -> None:
    """Let this process be killed as soon as its launcher is gone, however that ended."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    else:
        threading.Thread(target=_watch_parent, args=(launcher,), daemon=True).start()
    if os.getppid() != launcher:  # it was gone before this process asked
        os._exit(1)


def _wait_for_news(running: Sequence[RankProcess]) -> list[RankProcess]:
    """The ranks that said something or have ended, as soon as there are some, or none after POLL_SECONDS."""
    pipes = [rank.told for rank in running if not rank.told.closed]
    ready = wait([*pipes, *(rank.process.sentinel for rank in running)], POLL_SECONDS)
    news = [rank for rank in running if rank.told in ready or rank.process.sentinel in ready]
    for rank in news:
        if rank.process.sentinel in ready:
            rank.process.join()
    return news


def _hung(running: Sequence[RankProcess], board: PulseBoard, limits: LaunchConfig) -> Ending:
    """Find out which rank the others wait for, and what all of them are doing."""
    positions = board.positions()
    processes = {rank.rank: rank.pid for rank in running}
    stopped = stopped_processes(processes)
    stacks = read_stacks(processes, {rank.rank: rank.stacks.fileno() for rank in running})
    suspects = find_suspects({rank: positions[rank] for rank in processes}, stopped, stacks)
    failures = tuple(_failure_of(suspect, limits) for suspect in suspects)
    others = processes.keys() - {suspect.rank for suspect in suspects}
    return Ending(failures, tuple(sorted(others)), stacks)


def _failure_of(suspect: Suspect, limits: LaunchConfig) -> Failure:
    position = suspect.position
    seconds = limit_seconds(position, limits.watchdog)
    text = (
        f"no progress in section {position.section} after step {position.step} for longer than "
        f"launch.watchdog.{position.section}_seconds = {seconds:g}: {suspect.reason}"
    )
    text += f"; it is in {suspect.place}" if suspect.place else ""
    return Failure(suspect.rank, 1, text, text, killed=True, seconds=0.0)


def _pipe() -> tuple[Connection, Connection]:
    """A pipe's reading and writing end."""
    read_end, write_end = os.pipe()
    return Connection(read_end, writable=False), Connection(write_end, readable=False)


def _watch_parent(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGKILL)
