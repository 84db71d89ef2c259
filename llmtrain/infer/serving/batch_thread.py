"""A thread that owns a batch: requests and cancellations go in from other threads, tokens come out to theirs."""

import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol

from llmtrain.errors import LlmtrainError
from llmtrain.infer.batching.request import NewToken, Request
from llmtrain.infer.batching.scheduler import Limits
from llmtrain.infer.model import TrainedModel

_logger = logging.getLogger(__name__)


class TokenWriter(Protocol):
    """What writes tokens: `ContinuousBatch`."""

    @property
    def is_idle(self) -> bool: ...
    def add(self, request: Request) -> int: ...
    def cancel(self, number: int) -> None: ...
    def step(self) -> list[NewToken]: ...


class FullError(LlmtrainError):
    """More requests wait than may."""


class DeadError(LlmtrainError):
    """The model has failed, and nothing more comes of it."""


@dataclass(eq=False)
class Ticket:
    """A request that was taken in. `tell` is called in the batch's thread with every token, or what went wrong."""

    request: Request
    tell: Callable[[NewToken | DeadError], None]
    number: int | None = None


class BatchThread:
    """Requests are taken as long as at most `room` of them are on their way."""

    def __init__(self, batch: TokenWriter, room: int) -> None:
        self.room = room
        self.failure: DeadError | None = None
        self._batch = batch
        self._open = set[Ticket]()
        self._by_number = dict[int, Ticket]()
        self._asked: deque[Callable[[], None]] = deque()
        self._changed = threading.Condition()
        self._stops = False
        self._thread = threading.Thread(target=self._work, name="batch", daemon=True)
        self._thread.start()

    @property
    def num_open(self) -> int:
        """Requests on their way."""
        return len(self._open)

    def submit(self, requests: list[Request], tell: Callable[[int, NewToken | DeadError], None]) -> list[Ticket]:
        """Take all of these, or none. `tell` gets the place of a request among them with each of its tokens.

        Raises FullError, and DeadError.
        """
        with self._changed:
            if self.failure is not None:
                raise self.failure
            if len(self._open) + len(requests) > self.room:
                raise FullError(f"{len(self._open)} texts are being written or wait, and at most {self.room} may.")
            tickets = [
                Ticket(request, lambda new, place=place: tell(place, new)) for place, request in enumerate(requests)
            ]
            self._open |= set(tickets)
            self._ask(lambda: self._add(tickets))
        return tickets

    def cancel(self, tickets: list[Ticket]) -> None:
        """Free what requests hold, those that have ended too."""
        with self._changed:
            self._ask(lambda: [self._drop(ticket) for ticket in tickets])

    def call(self, work: Callable[[], Any]) -> "Future[Any]":
        """Do something with the model between two steps."""
        future: Future[Any] = Future()

        def done() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                if self.failure is not None:
                    raise self.failure
                future.set_result(work())
            except Exception as error:
                future.set_exception(self.failure or error)

        with self._changed:
            if self.failure is not None:
                raise self.failure
            self._ask(done)
        return future

    def fail(self, reason: str) -> None:
        """The model can do no more: tell whoever waits, also where the thread is amid a step."""
        self._die(DeadError(f"The model has failed: {reason}."))

    def stop(self) -> None:
        """End the thread; what is on its way is left."""
        with self._changed:
            self._stops = True
            self._changed.notify()
        if self.failure is None:  # else it may be amid a step that does not end
            self._thread.join()

    def _ask(self, work: Callable[[], Any]) -> None:
        self._asked.append(work)
        self._changed.notify()

    def _work(self) -> None:
        try:
            while self._do_asked():
                for new in self._batch.step():
                    if self.failure is not None:
                        return
                    ticket = self._by_number[new.request]
                    if new.ending is not None:
                        self._drop(ticket)
                    ticket.tell(new)
        except BaseException as error:
            if self.failure is None:
                _logger.exception("the model has failed")
            self._die(DeadError(f"The model has failed: {type(error).__name__}."))

    def _do_asked(self) -> bool:
        """Do what was asked for, wait where nothing is to be done; False where the thread is to end."""
        while True:
            with self._changed:
                while not self._asked and not self._stops and self._batch.is_idle:
                    self._changed.wait()
                if self._stops:
                    return False
            while self._asked:
                self._asked.popleft()()
            if not self._batch.is_idle:
                return True

    def _add(self, tickets: list[Ticket]) -> None:
        """Hand them to the batch, but for those that were given up already."""
        for ticket in tickets:
            if ticket in self._open:
                ticket.number = self._batch.add(ticket.request)
                self._by_number[ticket.number] = ticket

    def _drop(self, ticket: Ticket) -> None:
        self._open.discard(ticket)
        if ticket.number is not None and self._by_number.pop(ticket.number, None) is not None:
            self._batch.cancel(ticket.number)

    def _die(self, failure: DeadError) -> None:
        with self._changed:
            if self.failure is not None:
                return
            self.failure, self._stops = failure, True
            left, self._open = self._open, set()
            asked, self._asked = self._asked, deque()
            self._by_number.clear()
            self._changed.notify()
        for ticket in left:
            ticket.tell(failure)
        for work in asked:  # who waits for work of his own is told, too
            work()


def start_batch(trained: TrainedModel, limits: Limits, room: int) -> BatchThread:
    """A thread that writes with a model within these limits, and dies with the ranks that hold it."""
    thread = BatchThread(trained.batch(limits), room)
    if trained.ranks is not None:
        trained.ranks.failure.add_done_callback(lambda said: thread.fail(said.result()))
    return thread
