"""Functions that run on several ranks at once: gloo processes on this machine, forked from a server that has imported
what they need. A call costs forks and a rendezvous, not imports.
"""

import gc
import importlib
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any

from launch.forking.rank_process import die_with

PRELOAD_VARIABLE = "LLMTRAIN_PRELOAD"
"""Names the modules that the server imports, in its environment: a server is told nothing else before it forks."""


MEETING_SECONDS = 300.0
"""How long the ranks may take to start and meet, on a busy machine too. What they are given to do is timed after it."""


class RankError(AssertionError):
    """A rank raised; the text is its traceback."""


class Forks:
    """A fork server with some modules imported. One per process: multiprocessing has one server."""

    def __init__(self, modules: Sequence[str]) -> None:
        self._context = multiprocessing.get_context("forkserver")
        os.environ[PRELOAD_VARIABLE] = " ".join(modules)
        self._context.set_forkserver_preload(["llmtrain.checks.parity.rank_pool_preload"])

    def run(
        self, function: Callable[..., Any], world_size: int, *args: Any, timeout_seconds: float = 600.0
    ) -> list[Any]:
        """Call `function(rank, world_size, *args)` on every rank of a new gloo group; returns the results by rank.

        The function belongs to a module. Each rank computes with one thread. Raises RankError with the traceback of the
        first rank that raised, or where the ranks, once they have met, are not done in time; none is left running.
        """
        _start_server()
        with tempfile.TemporaryDirectory() as folder:
            pipes: list[Any] = []
            processes = []
            try:
                for rank in range(world_size):
                    here, there = self._context.Pipe()
                    place = (rank, world_size, Path(folder) / "store", timeout_seconds)
                    process = self._context.Process(target=_run_rank, args=(there, place, function, args))
                    process.start()
                    there.close()
                    pipes.append(here)
                    processes.append(process)
                _gather(pipes, MEETING_SECONDS)
                for pipe in pipes:
                    with suppress(OSError):  # it has ended: that is heard in its place
                        pipe.send_bytes(b"begin")
                return _gather(pipes, timeout_seconds)
            finally:
                for process in processes:
                    process.kill()
                for process in processes:
                    process.join()


def _start_server() -> None:
    """Start the server, if it does not run yet. It and its ranks are deaf to the keyboard, and end with this process.

    By itself it would be deaf once its imports are done.
    """
    resource_tracker.ensure_running()  # it lets signals through that were held back
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def preload() -> None:
    """Import what the ranks need. Called in the server, before the first fork."""
    die_with(os.getppid())  # a rank that is asked for just then would keep the server, and the server the rank
    sys.excepthook = _report_unasked
    os.environ["OMP_NUM_THREADS"] = "1"
    for name in os.environ.get(PRELOAD_VARIABLE, "").split():
        with suppress(ImportError):  # an engine that is not installed on this platform
            importlib.import_module(name)
    gc.freeze()  # ranks' garbage collections pass over what is imported


def _report_unasked(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print what is raised in the server before a rank begins, unless whoever gave the order is gone."""
    if not issubclass(kind, EOFError | ConnectionError | pickle.UnpicklingError):
        sys.__excepthook__(kind, error, trace)


def _gather(pipes: list[Connection], timeout_seconds: float) -> list[Any]:
    """The next message of each rank. Raises RankError where one raised or was killed, or where some are late."""
    deadline = time.monotonic() + timeout_seconds
    results: dict[Connection, Any] = {}
    while len(results) < len(pipes):
        ready = wait([pipe for pipe in pipes if pipe not in results], max(0.0, deadline - time.monotonic()))
        if not ready:
            late = [rank for rank, pipe in enumerate(pipes) if pipe not in results]
            raise RankError(f"ranks {late} were not done in time")
        for pipe in ready:
            assert isinstance(pipe, Connection)
            rank = pipes.index(pipe)
            try:
                error, results[pipe] = pickle.loads(pipe.recv_bytes())  # noqa: S301 (a child of ours wrote it)
            except EOFError:
                raise RankError(f"rank {rank} of {len(pipes)} was killed") from None
            if error:
                raise RankError(f"rank {rank} of {len(pipes)}:\n{error}")
    return [results[pipe] for pipe in pipes]


def _run_rank(
    told: Connection, place: tuple[int, int, Path, float], function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    import torch
    import torch.distributed as dist

    die_with(os.getppid())  # the server, which ends with whoever has started it
    rank, world_size, store, timeout_seconds = place
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(str(store), world_size),  # pyright: ignore[reportPrivateImportUsage]  # documented
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=MEETING_SECONDS + timeout_seconds),
        )
        told.send_bytes(pickle.dumps((None, "met")))
        told.recv_bytes()  # nobody begins, and perhaps ends, while others still connect to it
        said = pickle.dumps((None, function(rank, world_size, *args)))
    except BaseException:
        said = pickle.dumps((traceback.format_exc(), None))
    # As bytes: the connection's own pickling would send tensors as memory that ends with this process.
    told.send_bytes(said)
    # The result is sent: whatever a library does at the end of a process need not happen.
    told.close()
    os._exit(0)
