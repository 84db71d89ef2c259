"""A thread that does things before they are needed, in the order in which they are asked for."""

import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Generic, TypeVar

Result = TypeVar("Result")
Task = tuple[Future[Result], Callable[[], Result]]


class ReadAhead(Generic[Result]):
    """Does tasks in the order in which they are given, until nobody holds this object any more.

    Unlike an executor's, the thread keeps no process alive that wants to end: nothing depends on its tasks.
    """

    def __init__(self) -> None:
        self._tasks: SimpleQueue[Task[Result] | None] = SimpleQueue()
        self._started = False

    def submit(self, action: Callable[[], Result]) -> Future[Result]:
        """Ask for the result of an action. A future that is cancelled in time is never begun."""
        future: Future[Result] = Future()
        self._tasks.put((future, action))
        if not self._started:
            self._started = True
            threading.Thread(target=_work, args=(self._tasks,), name="read-ahead", daemon=True).start()
            weakref.finalize(self, self._tasks.put, None)
        return future


def _work(tasks: SimpleQueue[Task[Result] | None]) -> None:
    while _do_next(tasks):
        pass


def _do_next(tasks: SimpleQueue[Task[Result] | None]) -> bool:
    """A function of its own: while the thread waits for a task, nothing of the one before is held any more."""
    task = tasks.get()
    if task is None:
        return False
    future, action = task
    if future.set_running_or_notify_cancel():
        # Whoever waits for the future gets the error, whatever it is.
        try:
            future.set_result(action())
        except BaseException as error:
            future.set_exception(error)
    return True
