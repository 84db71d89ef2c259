"""Ranks as processes of this machine.

They are forked once everything they need is imported: PyTorch and an engine are imported once, not once per rank on the
same cores, nor again when all are started again. Nothing has been computed by then, so no thread is lost in the fork.
"""

import logging
import os
import socket
import sys
from dataclasses import dataclass

from launch.forking.rank_process import LocalRankSet, RankProcess, start_rank
from launch.rank.cores import num_threads, set_threads
from launch.rank.failure import Failure, failure_text
from launch.rank.place import Rank
from launch.rank.signals import HeartbeatBoard, StopSignal, exit_after_grace
from launch.supervision.attempt import ChangeRun, import_for_ranks, rank_work, sum_up, watch, watches_speed
from launch.supervision.restarts import AttemptEnd, newest_step, supervise
from launch.supervision.stragglers import Stragglers
from llmtrain.config.schema import RunConfig
from llmtrain.messages import show_messages
from llmtrain.preflight.resolve import ResolvedRun
from llmtrain.runs.rank_logs import log_path

_logger = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"


def launch(resolved: ResolvedRun, change_run: ChangeRun | None = None) -> int:
    """Run it and return the exit code; `change_run` may replace parts of the run on each rank."""
    config = resolved.config
    set_threads(num_threads(config.launch, config.launch.num_workers))
    with StopSignal() as stop:
        # A single rank as well gets a process of its own, which this one can start again. Elsewhere than on Linux a
        # fork after the imports is not safe with every system library.
        supervised = config.launch.max_stalled_attempts > 0 and sys.platform == "linux"
        if config.launch.num_workers > 1 or supervised:
            return supervise(config, LocalAttempts(config, stop, change_run).run)
        # It imports torch: only once the configuration is known to be right.
        from launch.rank.worker import run_worker

        exit_after_grace(stop, config.launch.grace_seconds)
        return run_worker(resolved, stop, change_run=change_run)


def run_as_rank(resolved: ResolvedRun, place: Rank) -> int:
    """Be one rank that another launcher started. What goes wrong is told at once, with the rank."""
    show_messages(place.rank)
    config = resolved.config
    set_threads(num_threads(config.launch, place.local_world_size))
    from launch.rank.worker import run_worker

    try:
        with StopSignal() as stop:
            exit_after_grace(stop, config.launch.grace_seconds)
            return run_worker(resolved, stop, place)
    except BaseException as error:
        failure = Failure.of_error(place.rank, error)
        log = log_path(config.run_dir, place.rank)
        logs = str(log) if failure.is_defect and log.exists() else ""
        _logger.error("%s", failure_text([failure], logs=logs))
        # A thread may wait for ranks that are gone: it must not keep this one.
        os._exit(failure.exit_code)


@dataclass(frozen=True)
class LocalAttempts:
    """Starts all ranks of a run and waits for their end, as often as asked."""

    config: RunConfig
    stop: StopSignal
    change_run: ChangeRun | None = None

    def run(self, number: int) -> AttemptEnd:
        """One attempt, from the newest valid checkpoint."""
        from launch.rank.rendezvous import serve_store

        import_for_ranks(self.config.engine.name)
        # All ranks are on this machine: no other network interface, and no name of this machine, is needed.
        if sys.platform == "linux":
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        board = HeartbeatBoard(self.config.launch.num_workers, newest_step(self.config.run_dir))
        # The port is taken before anybody knows it, and stays with this process: nobody else can get it.
        listener = socket.create_server((LOOPBACK, 0))
        ranks: list[RankProcess] = []
        try:
            world_size, (host, port) = self.config.launch.num_workers, listener.getsockname()
            for rank in range(world_size):
                place = Rank(rank, world_size, rank, world_size, host, port, attempt=number)
                work = rank_work(self.config, self.stop, place, board, rank, self.change_run)
                ranks.append(start_rank(place, self.stop, [listener], work))
            store = serve_store(listener)
            rank_set = LocalRankSet(ranks)
            look = Stragglers(self.config, board, rank_set.host).look if watches_speed(self.config) else lambda: None
            ending = watch(rank_set, board, self.stop, self.config.launch, look)
            del store  # not before: ranks that save or fail may still talk through it
        finally:
            for rank in ranks:
                rank.end()
        return sum_up(self.config, ending, board, self.stop)
