"""The texts of one call: asked of the batch together, read piece by piece, given up when nobody reads on."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType

from llmtrain.infer.batching.request import Ending, NewToken, Request
from llmtrain.infer.batching.sampling import LogProbs
from llmtrain.infer.serving.asked import AskedError
from llmtrain.infer.serving.batch_thread import BatchThread, DeadError, FullError
from llmtrain.infer.serving.metrics import ServingMetrics
from llmtrain.infer.text_stream import TextStream

RETRY_SECONDS = 1


@dataclass
class TextPiece:
    """What one token has added to one text: characters that are certain now, and why the text has ended with it."""

    place: int
    text: str
    token: int | None = None
    logprobs: LogProbs | None = None
    ending: Ending | None = None


@dataclass
class WrittenText:
    """One text so far."""

    stream: TextStream
    tokens: list[int] = field(default_factory=list)
    logprobs: list[LogProbs] = field(default_factory=list)
    text: str = ""
    ending: Ending | None = None

    def grown(self, place: int, new: NewToken) -> TextPiece:
        """Take in a token. The one that ends a text is no part of it."""
        text, counted = "", new.ending != "stop"
        if counted:
            self.tokens.append(new.token)
            text = self.stream.push(new.token)
        if new.ending is not None:
            text += self.stream.end()
        self.ending = "stop" if self.stream.stopped else new.ending
        self.text += text
        if counted and new.logprobs is not None:
            self.logprobs.append(new.logprobs)
        return TextPiece(place, text, new.token if counted else None, new.logprobs if counted else None, self.ending)


class Choices:
    """The texts of some requests, as a context: on leaving it, whatever is not finished is given up."""

    def __init__(
        self, batch: BatchThread, metrics: ServingMetrics, requests: Sequence[Request], streams: Sequence[TextStream]
    ) -> None:
        self.choices = [WrittenText(stream) for stream in streams]
        self._batch, self._metrics, self._requests = batch, metrics, list(requests)
        self._arrived: asyncio.Queue[tuple[int, NewToken | DeadError]] = asyncio.Queue()

    def __enter__(self) -> "Choices":
        """Raises AskedError where there is no room."""
        loop = asyncio.get_running_loop()

        def tell(place: int, new: NewToken | DeadError) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._arrived.put_nowait, (place, new))

        self._last = [time.perf_counter()] * len(self.choices)
        try:
            self._tickets = self._batch.submit(self._requests, tell)
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

    async def pieces(self) -> AsyncIterator[TextPiece]:
        """What comes, of whichever text. Raises AskedError where the model fails."""
        left = len(self.choices)
        while left:
            place, new = await self._arrived.get()
            if isinstance(new, DeadError):
                raise AskedError(str(new), status=503)
            choice = self.choices[place]
            if choice.ending is not None:
                continue  # written before its stop string was seen
            now = time.perf_counter()
            self._metrics.token(now - self._last[place], first=not choice.tokens)
            self._last[place] = now
            piece = choice.grown(place, new)
            if piece.ending is not None:
                left -= 1
                self._batch.cancel([self._tickets[place]])
            yield piece

    async def whole(self) -> list[WrittenText]:
        """All texts, when the last one has ended."""
        async for _ in self.pieces():
            pass
        return self.choices
