"""The seam between tasks and who does them: processes of this machine here, Ray's tasks in launch/on_ray."""

import multiprocessing
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.connection import wait as wait_for
from typing import Protocol, TypeVar

from llmtrain.errors import LlmtrainError, StoppedError

Argument = TypeVar("Argument")
Result = TypeVar("Result")

MOST_DEATHS = 3
"""Times that processes may die while they do one task, before the pipeline gives it up."""


class Executor(Protocol):
    """Calls a function of a module for many arguments, in any order and place; a call may be repeated."""

    def each(
        self, function: Callable[[Argument], Result], arguments: Iterable[Argument]
    ) -> Iterator[tuple[Argument, Result]]:
        """Arguments with their results, as they come. Raises what the function raises."""
        ...


Stopped = Callable[[], bool]
"""True once the command was told to stop."""


class UntilStopped:
    """The calls of another executor, until the command is told to stop."""

    def __init__(self, executor: Executor, stopped: Stopped) -> None:
        self._executor = executor
        self._stopped = stopped

    def each(
        self, function: Callable[[Argument], Result], arguments: Iterable[Argument]
    ) -> Iterator[tuple[Argument, Result]]:
        """See Executor. Told to stop, it begins no other call, and raises StoppedError once those that are under way
        have ended, or where they cannot any more: whoever tells the command may have told what works for it as well.
        """
        left: list[Argument] = []

        def drawn() -> Iterator[Argument]:
            for argument in arguments:
                if self._stopped():
                    left.append(argument)
                    return
                yield argument

        try:
            yield from self._executor.each(function, drawn())
        except LlmtrainError as error:
            if not self._stopped():
                raise
            raise StoppedError(f"stopped, with tasks under way ({error}): they are done again next time") from error
        if left:
            raise StoppedError(f"stopped before {left[0]}. What is done stays done: the same command continues.")


class InThisProcess:
    """One after another, here."""

    def each(
        self, function: Callable[[Argument], Result], arguments: Iterable[Argument]
    ) -> Iterator[tuple[Argument, Result]]:
        for argument in arguments:
            yield argument, function(argument)


class Processes:
    """Processes that end with this one, however it ends."""

    def __init__(self, workers: int, stopped: Stopped = lambda: False) -> None:
        self._workers = workers
        self._stopped = stopped
        self._pool = _new_pool(workers)

    def each(
        self, function: Callable[[Argument], Result], arguments: Iterable[Argument]
    ) -> Iterator[tuple[Argument, Result]]:
        left = iter(arguments)
        waiting: dict[Future[Result], Argument] = {}
        again: list[Argument] = []
        deaths: Counter[str] = Counter()
        while True:
            # Twice as many as workers: none waits for this process, and an error ends the rest soon.
            while len(waiting) < 2 * self._workers:
                argument = again.pop() if again else next(left, None)
                if argument is None:
                    break
                waiting[self._pool.submit(function, argument)] = argument
            if not waiting:
                return
            for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                argument = waiting.pop(future)
                try:
                    yield argument, future.result()
                except BrokenProcessPool:
                    again += self._after_death([argument, *waiting.values()], deaths)
                    waiting = {}
                    break

    def _after_death(self, arguments: list[Argument], deaths: Counter[str]) -> list[Argument]:
        """A new pool for the tasks that were under way: the library does not say whose process died."""
        if self._stopped():
            raise LlmtrainError("their processes were ended")
        deaths.update(str(argument) for argument in arguments)
        name, count = deaths.most_common(1)[0]
        if count >= MOST_DEATHS:
            raise LlmtrainError(
                f"processes died {count} times during {name}. The system may have too little memory: try fewer with "
                "run.workers, or a smaller chunk_bytes in another folder."
            )
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._pool = _new_pool(self._workers)
        return arguments

    def close(self) -> None:
        """End the processes."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        for process in list((self._pool._processes or {}).values()):  # private: there is no public way to stop a task
            process.terminate()


def _new_pool(workers: int) -> ProcessPoolExecutor:
    # Forked from a server that has no threads and has the modules already.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["data_pipelines.pipeline.tasks"])
    return ProcessPoolExecutor(workers, context, initializer=_end_with_parent)


def _end_with_parent() -> None:
    """Without this a worker whose parent was killed waits for work forever. A terminal's Ctrl-C is the parent's."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait_for([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def executor_of(workers: int, stopped: Stopped) -> Iterator[Executor]:
    """Processes of this machine, `workers` of them or one for each core, that work until the command is to stop."""
    number = (
        workers or len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else workers or os.cpu_count() or 1
    )
    if number == 1:
        yield UntilStopped(InThisProcess(), stopped)
        return
    processes = Processes(number, stopped)
    try:
        yield UntilStopped(processes, stopped)
    finally:
        processes.close()
