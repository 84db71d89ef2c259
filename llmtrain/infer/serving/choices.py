"""The texts of one call: asked of the batch together, read piece by piece, given up when nobody reads on."""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType

from llmtrain.infer.batching.request import Ending, NewToken, Request
from llmtrain.infer.batching.sampling import LogProbs
from llmtrain.infer.serving.asked import AskedError
from llmtrain.infer.serving.batch_thread import BatchThread, DeadError, FullError
from llmtrain.infer.serving.metrics import ServingMetrics
from llmtrain.infer.text_stream import TextStream

RETRY_SECONDS = 1
Told = NewToken | DeadError


class Arrivals:
    """What the batch's thread tells calls of one loop. To wake a loop takes longer than to take a token: it is woken
    once for all that comes before it looks."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._waiting: deque[tuple[Callable[[int, Told], None], int, Told]] = deque()
        self._will_look = False

    def post(self, take: Callable[[int, Told], None], place: int, new: Told) -> None:
        """Have the loop call `take`; from any thread."""
        self._waiting.append((take, place, new))
        if not self._will_look and not self.loop.is_closed():
            self._will_look = True
            self.loop.call_soon_threadsafe(self._look)

    def _look(self) -> None:
        self._will_look = False  # before it looks: what comes meanwhile is told again, rather than never
        while self._waiting:
            take, place, new = self._waiting.popleft()
            take(place, new)


@dataclass
class TextPiece:
    """What some tokens have added to one text: characters that are certain now, and why it has ended with them."""

    place: int
    text: str
    tokens: list[int]
    logprobs: list[LogProbs]
    ending: Ending | None = None


@dataclass
class WrittenText:
    """One text so far."""

    stream: TextStream
    tokens: list[int] = field(default_factory=list)
    logprobs: list[LogProbs] = field(default_factory=list)
    text: str = ""
    ending: Ending | None = None

    def grown(self, place: int, new: Sequence[NewToken]) -> TextPiece:
        """Take in the next tokens, of which the last one may end the text. One that is an end is no part of it."""
        counted = [each for each in new if each.ending != "stop"]
        piece = TextPiece(
            place, self.stream.push(*(each.token for each in counted)), [each.token for each in counted],
            [each.logprobs for each in counted if each.logprobs is not None],
        )  # fmt: skip
        if new[-1].ending is not None:
            piece.text += self.stream.end()
        piece.ending = self.ending = "stop" if self.stream.stopped else new[-1].ending
        self.tokens += piece.tokens
        self.logprobs += piece.logprobs
        self.text += piece.text
        return piece


class Choices:
    """The texts of some requests, as a context: on leaving it, whatever is not finished is given up."""

    def __init__(
        self,
        batch: BatchThread,
        metrics: ServingMetrics,
        arrivals: Arrivals,
        requests: Sequence[Request],
        streams: Sequence[TextStream],
    ) -> None:
        self.choices = [WrittenText(stream) for stream in streams]
        self._batch, self._metrics, self._arrivals, self._requests = batch, metrics, arrivals, list(requests)
        self._tokens: list[list[NewToken]] = [[] for _ in streams]
        self._failure: DeadError | None = None
        self._changed = asyncio.Event()
        self._wakes_for_each = True

    def __enter__(self) -> "Choices":
        """Raises AskedError where there is no room."""
        self._last: list[float | None] = [None] * len(self.choices)
        self._begin = time.perf_counter()
        try:
            self._tickets = self._batch.submit(
                self._requests, lambda place, new: self._arrivals.post(self._take, place, new)
            )
        except FullError as error:
            headers = {"Retry-After": str(RETRY_SECONDS)}
            raise AskedError(f"{error} Try again later.", status=429, code="queue_full", headers=headers) from None
        except DeadError as error:
            raise AskedError(str(error), status=503) from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._batch.cancel(
            [ticket for ticket, choice in zip(self._tickets, self.choices, strict=True) if not choice.ending]
        )

    def _take(self, place: int, new: Told) -> None:
        """Hold one more token for who reads on."""
        if isinstance(new, DeadError):
            self._failure = new
        else:
            now, last = time.perf_counter(), self._last[place]
            self._metrics.token(now - (last or self._begin), first=last is None)
            self._last[place] = now
            self._tokens[place].append(new)
        if self._wakes_for_each or isinstance(new, DeadError) or new.ending is not None:
            self._changed.set()

    async def pieces(self) -> AsyncIterator[TextPiece]:
        """What comes, of whichever text. Raises AskedError where the model fails before all have ended."""
        left = len(self.choices)
        while left:
            await self._changed.wait()
            self._changed.clear()
            for place, choice in enumerate(self.choices):
                new, self._tokens[place] = self._tokens[place], []
                # One by one where one of them may complete a stop string: what was written behind it does not count.
                for tokens in ([each] for each in new) if choice.stream.has_stops else filter(None, (new,)):
                    if choice.ending is not None:
                        break
                    piece = choice.grown(place, tokens)
                    if piece.ending is not None:
                        left -= 1
                        self._batch.cancel([self._tickets[place]])
                    yield piece
            if left and self._failure is not None:
                raise AskedError(str(self._failure), status=503)

    async def whole(self) -> list[WrittenText]:
        """All texts, when the last one has ended."""
        # Without a stop string to look for, a token needs nobody's time until the last one is there.
        self._wakes_for_each = any(choice.stream.has_stops for choice in self.choices)
        async for _ in self.pieces():
            pass
        return self.choices
