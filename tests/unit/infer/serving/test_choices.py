"""Texts of a call as they come: a loop that is woken seldom, readers that lag behind, stop strings."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any, cast

import pytest

from llmtrain.infer.batching.request import NewToken, Request
from llmtrain.infer.serving.asked import AskedError
from llmtrain.infer.serving.batch_thread import BatchThread, DeadError
from llmtrain.infer.serving.choices import Arrivals, Choices, TextPiece, Told
from llmtrain.infer.serving.metrics import ServingMetrics
from llmtrain.infer.text_stream import TextStream
from llmtrain.values.tokenizer import Tokenizer

LETTERS = [40 + number for number in range(10)]


class Letters:
    """A tokenizer whose tokens are characters."""

    vocab_size = 256

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


class WholeTexts:
    """Writes each text at once."""

    def __init__(self) -> None:
        self.texts = dict[int, Request]()

    @property
    def is_idle(self) -> bool:
        return not self.texts

    def add(self, request: Request) -> int:
        self.texts[len(self.texts)] = request
        return len(self.texts) - 1

    def cancel(self, number: int) -> None:
        self.texts.pop(number, None)

    def step(self) -> list[NewToken]:
        return [
            NewToken(number, token, "length" if token == LETTERS[-1] else None)
            for token in LETTERS
            for number in self.texts
        ]


class CountedLoop(asyncio.SelectorEventLoop):
    woken = 0

    def call_soon_threadsafe(self, *args: Any, **more: Any) -> asyncio.Handle:
        self.woken += 1
        return super().call_soon_threadsafe(*args, **more)


@pytest.fixture
def thread() -> Iterator[BatchThread]:
    thread = BatchThread(WholeTexts(), 8)
    yield thread
    thread.stop()


def choices(thread: BatchThread, *stops: str, texts: int = 2) -> Choices:
    streams = [TextStream(cast(Tokenizer, Letters()), {}, stops) for _ in range(texts)]
    requests = [Request((1,), len(LETTERS))] * texts
    return Choices(thread, ServingMetrics(), Arrivals(asyncio.get_running_loop()), requests, streams)


def test_a_loop_is_woken_once_for_what_comes_before_it_looks() -> None:
    loop, taken = CountedLoop(), list[tuple[int, Told]]()
    arrivals = Arrivals(loop)

    def take(place: int, new: Told) -> None:
        taken.append((place, new))
        if place == 7:  # while it looks
            arrivals.post(take, 8, new)

    def posted(places: range) -> list[int]:
        before, woken = len(taken), loop.woken
        for place in places:
            arrivals.post(take, place, NewToken(0, 1))
        assert loop.woken == woken + 1
        loop.run_until_complete(asyncio.sleep(0))
        return [place for place, _ in taken[before:]]

    assert posted(range(8)) == [*range(8), 8]
    assert posted(range(3)) == [0, 1, 2]
    loop.close()
    arrivals.post(take, 1, NewToken(0, 1))  # to nobody


@pytest.mark.parametrize("read", ["whole", "pieces"])
@pytest.mark.parametrize(
    ("stops", "letters", "ending"), [((), 10, "length"), (("+,",), 5, "stop"), (("nowhere",), 10, "length")]
)
def test_what_comes_together_is_what_comes_one_by_one(
    read: str, stops: tuple[str, ...], letters: int, ending: str, thread: BatchThread
) -> None:
    """Tokens behind a stop string do not count, though they were there when it was seen."""

    async def run() -> tuple[Choices, list[TextPiece]]:
        with choices(thread, *stops) as context:
            await asyncio.sleep(0.05)  # a reader that lags behind
            if read == "whole":
                assert await context.whole() is context.choices
                return context, []
            return context, [piece async for piece in context.pieces()]

    context, pieces = asyncio.run(run())
    text = "".join(map(chr, LETTERS))
    text = text[: min([text.find(stop) for stop in stops if stop in text], default=len(text))]
    for place, choice in enumerate(context.choices):
        assert (choice.text, choice.tokens, choice.ending) == (text, LETTERS[:letters], ending)
        if pieces:
            mine = [piece for piece in pieces if piece.place == place]
            assert "".join(piece.text for piece in mine) == text
            assert [token for piece in mine for token in piece.tokens] == choice.tokens
            assert [piece.ending for piece in mine if piece.ending] == [ending]


def test_whole_texts_wake_their_reader_at_their_ends(thread: BatchThread, monkeypatch: pytest.MonkeyPatch) -> None:
    woken = list[int]()
    original: Callable[[asyncio.Event], None] = asyncio.Event.set

    def counted(event: asyncio.Event) -> None:
        woken.append(1)
        original(event)

    async def run() -> None:
        with choices(thread, texts=1) as context:
            task = asyncio.ensure_future(context.whole())
            monkeypatch.setattr(asyncio.Event, "set", counted)
            await task

    asyncio.run(run())
    assert len(woken) <= 2, "the first token may come before it is known how the text is read"


def test_what_was_written_before_the_model_failed_is_read_first(thread: BatchThread) -> None:
    """Whole texts are answers, though the failure came before anybody looked; of others it is told."""

    async def run(whole: int) -> int:
        with choices(thread) as context:
            thread.cancel(context._tickets)
            await asyncio.sleep(0.05)
            context._tokens = [[], []]
            for place in range(whole):
                context._take(place, NewToken(0, LETTERS[0], "length"))
            context._take(0, DeadError("gone"))
            seen = 0
            with pytest.raises(AskedError) if whole < 2 else nullcontext():
                async for _ in context.pieces():
                    seen += 1
            return seen

    assert [asyncio.run(run(whole)) for whole in (0, 1, 2)] == [0, 1, 2]
