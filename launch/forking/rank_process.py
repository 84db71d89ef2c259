"""Ranks as forked processes of this machine: starting them, hearing them, ending them."""

import ctypes
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

from launch.rank.failure import Failure
from launch.rank.place import Rank
from launch.rank.signals import StopSignal
from launch.supervision.attempt import POLL_SECONDS, RankNews
from launch.supervision.hangs import dump_on_signal, read_stacks, stopped_processes

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

    def has_ended(self) -> bool:
        """True once the process has ended; its exit code is known then."""
        self.process.join(0)
        return self.process.exitcode is not None

    def hear_failure(self) -> Failure | None:
        """The failure that it tells; None where it has told none yet, or has ended without a word."""
        if self.told.closed or not self.told.poll():
            return None
        try:
            return Failure.from_bytes(self.told.recv_bytes())
        except EOFError:
            self.told.close()
            return None

    def end(self) -> None:
        """Kill what still runs. TERM would mean: save first."""
        if self.process.is_alive():
            self.process.kill()
        self.process.join()
        self.told.close()
        self.stacks.close()


@dataclass(frozen=True)
class LocalRankSet:
    """The ranks of an attempt, all of them processes that this one has forked; by rank."""

    ranks: Sequence[RankProcess]

    def news(self, running: Collection[int]) -> list[RankNews]:
        """See `RankSet`."""
        ranks = [self.ranks[rank] for rank in running]
        pipes = [rank.told for rank in ranks if not rank.told.closed]
        wait([*pipes, *(rank.process.sentinel for rank in ranks)], POLL_SECONDS)
        found = []
        for rank in ranks:
            # In this order: what it said last may still be in the pipe once it has ended.
            ended = rank.has_ended()
            failure = rank.hear_failure()
            if ended or failure:
                found.append(RankNews(rank.rank, failure, rank.process.exitcode if ended else None))
        return found

    def helpless(self, running: Collection[int]) -> Mapping[int, str]:
        """See `RankSet`."""
        return stopped_processes({rank: self.ranks[rank].pid for rank in running})

    def stacks(self, running: Collection[int]) -> dict[int, str]:
        """See `RankSet`."""
        return read_stacks({rank: (self.ranks[rank].pid, self.ranks[rank].stacks.fileno()) for rank in running})

    def host(self, rank: int) -> str:
        """See `RankSet`."""
        return socket.gethostname()


def start_rank(place: Rank, stop: StopSignal, foreign: Sequence[socket.socket], work: Callable[[], int]) -> RankProcess:
    """Fork one rank, whose exit code is what `work` returns. `foreign` are sockets that it must not hold."""
    told, telling = _pipe()
    stacks, dumping = _pipe()
    launcher = os.getpid()

    def life() -> None:
        """Never returns: nothing of the launcher's own ending may run in a rank."""
        for held in foreign:  # a listening socket that a rank kept would keep its port after the launcher's end
            held.close()
        die_with(launcher)  # before anything else that may take long
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
    # The rank alone holds the writing ends, so that its end closes the pipes.
    telling.close()
    dumping.close()
    return RankProcess(place.rank, process, told, stacks)


def die_with(launcher: int) -> None:
    """Let this process be killed as soon as its launcher is gone, however that ended."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    else:
        threading.Thread(target=_watch_parent, args=(launcher,), daemon=True).start()
    if os.getppid() != launcher:  # it was gone before this process asked
        os._exit(1)


def _pipe() -> tuple[Connection, Connection]:
    """A pipe's reading and writing end."""
    read_end, write_end = os.pipe()
    return Connection(read_end, writable=False), Connection(write_end, readable=False)


def _watch_parent(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGKILL)
