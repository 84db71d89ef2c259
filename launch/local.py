"""Ranks as processes of this machine.

One rank runs in this very process. Several are forked once everything they need is imported: PyTorch and an engine are
imported once, not once per rank on the same cores. Nothing has been computed by then, so no thread is lost in the fork.
"""

import ctypes
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from launch.failure import Failure, failure_text, first_cause
from launch.rank import Rank, num_threads, set_threads
from launch.rank_log import log_path
from launch.stop import StopSignal
from llmtrain.config.schema import RunConfig
from llmtrain.errors import EXIT_PREEMPTED, EXIT_TOLD_TWICE
from llmtrain.train.run_folder import RunFolder, read_status

LOOPBACK = "127.0.0.1"
GRACE_SECONDS = 1.5
"""How long ranks may take to end by themselves once one has failed; then they are killed."""

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def launch(config: RunConfig) -> int:
    """Run the configuration and return the exit code."""
    num_ranks = config.launch.num_workers
    set_threads(num_threads(config.launch, num_ranks))
    if num_ranks > 1:
        # Asked through the driver's library, a GPU is not initialized by the question: the forked ranks can be.
        os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    from launch.worker import run_worker  # imports torch: only once the configuration is known to be right

    with StopSignal() as stop:
        return run_worker(config, stop) if num_ranks == 1 else run_ranks(config, stop)


def run_as_rank(config: RunConfig, place: Rank) -> int:
    """Be one rank that another launcher started. What goes wrong is told at once, with the rank."""
    set_threads(num_threads(config.launch, place.local_world_size))
    from launch.worker import run_worker

    try:
        with StopSignal() as stop:
            return run_worker(config, stop, place)
    except BaseException as error:
        failure = Failure.of_error(place.rank, error)
        sys.stderr.write(failure_text([failure], logs=log_of(config, failure)) + "\n")
        sys.stderr.flush()
        # A thread may wait for ranks that are gone: it must not keep this one.
        os._exit(failure.exit_code)


def log_of(config: RunConfig, failure: Failure) -> str:
    """The log to look into; none for what the message explains."""
    path = log_path(Path(config.output_dir) / config.name, failure.rank)
    return str(path) if failure.is_defect and path.exists() else ""


@dataclass(frozen=True)
class RankProcess:
    """A forked rank, and the pipe through which it says why it failed."""

    rank: int
    process: BaseProcess
    told: Connection


def run_ranks(config: RunConfig, stop: StopSignal) -> int:
    """Start the ranks, wait for all of them, and return the exit code of the run."""
    import torch

    from launch.meeting import serve_store
    from llmtrain.train.setup import engine_class

    engine_class(config.engine.name)
    assert not torch.cuda.is_initialized(), "a GPU cannot be used after a fork"
    # The port is taken before anybody knows it, and stays with this process: nobody else can get it.
    listener = socket.create_server((LOOPBACK, 0))
    port = listener.getsockname()[1]
    ranks: list[RankProcess] = []
    try:
        for rank in range(config.launch.num_workers):
            place = Rank(rank, config.launch.num_workers, rank, config.launch.num_workers, LOOPBACK, port)
            ranks.append(start_rank(config, stop, place, listener))
        store = serve_store(listener)
        failures, stopped = watch(ranks)
        del store
    finally:
        kill(ranks)
    if failures:
        return report(config, failures, stopped, ranks[0])
    return max(rank.process.exitcode or 0 for rank in ranks)


def start_rank(config: RunConfig, stop: StopSignal, place: Rank, listener: socket.socket) -> RankProcess:
    """Fork one rank."""
    read_end, write_end = os.pipe()
    told, telling = Connection(read_end, writable=False), Connection(write_end, readable=False)

    def body() -> None:
        listener.close()
        die_with(launcher)
        rank_main(config, stop, place, telling)

    launcher = os.getpid()
    process = multiprocessing.get_context("fork").Process(target=body, name=f"rank-{place.rank}")
    process.start()
    telling.close()
    return RankProcess(place.rank, process, told)


def rank_main(config: RunConfig, stop: StopSignal, place: Rank, telling: Connection) -> None:
    """The life of a forked rank. Never returns: nothing of the launcher's own ending may run in it."""
    from launch.worker import run_worker

    stop.announces = False  # the launcher says it
    # All ranks are on this machine: no other network interface, and no name of this machine, is needed.
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    try:
        code = run_worker(config, stop, place)
    except BaseException as error:
        failure = Failure.of_error(place.rank, error)
        telling.send_bytes(failure.to_bytes())
        code = failure.exit_code
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def die_with(launcher: int) -> None:
    """Let this process be killed as soon as its launcher is gone, however that ended."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    else:
        threading.Thread(target=_watch_parent, args=(launcher,), daemon=True).start()
    if os.getppid() != launcher:  # it was gone before this process asked
        os._exit(1)


def _watch_parent(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGKILL)


def watch(ranks: Sequence[RankProcess]) -> tuple[list[Failure], list[int]]:
    """Wait until every rank has ended, or a little longer than the first failure: (failures, ranks that go on)."""
    failures: dict[int, Failure] = {}
    running = {rank.rank: rank for rank in ranks}
    deadline = None
    while running and (deadline is None or time.monotonic() < deadline):
        pipes = [rank.told for rank in running.values() if not rank.told.closed]
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        ready = wait([*pipes, *(rank.process.sentinel for rank in running.values())], left)
        for rank in list(running.values()):
            if rank.told in ready:
                failure = hear_failure(rank)
                if failure:
                    failures[rank.rank] = failure
            elif rank.process.sentinel in ready:
                rank.process.join()
                del running[rank.rank]
                code = rank.process.exitcode or 0
                if code not in (0, EXIT_PREEMPTED) and rank.rank not in failures:
                    failures[rank.rank] = Failure.of_exit(rank.rank, code)
        if failures and deadline is None:
            deadline = time.monotonic() + GRACE_SECONDS
    return list(failures.values()), sorted(running.keys() - failures.keys())


def hear_failure(rank: RankProcess) -> Failure | None:
    """What a rank says of its failure; None where it has ended without a word."""
    try:
        return Failure.from_bytes(rank.told.recv_bytes())
    except EOFError:
        rank.told.close()
        return None


def kill(ranks: Sequence[RankProcess]) -> None:
    """End what still runs. TERM would mean: save first."""
    for rank in ranks:
        if rank.process.is_alive():
            rank.process.kill()
    for rank in ranks:
        rank.process.join()


def report(config: RunConfig, failures: Sequence[Failure], stopped: Sequence[int], leader: RankProcess) -> int:
    """Say why the run failed, here and in its status; returns the exit code."""
    cause = first_cause(failures)
    if cause.exit_code == EXIT_TOLD_TWICE:
        return EXIT_TOLD_TWICE
    run_dir = Path(config.output_dir) / config.name
    sys.stderr.write(failure_text(failures, stopped, log_of(config, cause)) + "\n")
    status = read_status(run_dir)
    if status is not None and status.pid == leader.process.pid:
        # Rank 0 may have been killed in the middle, and knows the consequence only.
        with RunFolder(run_dir) as folder:
            message = f"rank {cause.rank} on {cause.host}: {cause.summary}"
            folder.write_status("failed", status.step, config.total_steps, message)
    return cause.exit_code
