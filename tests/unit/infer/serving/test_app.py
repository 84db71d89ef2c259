"""The app over a batch that writes when the test says so: full queues, clients that leave, a model that fails."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import httpx
import pytest
import torch
from starlette.applications import Starlette
from starlette.types import Message

from llmtrain.infer.model import load_model
from llmtrain.infer.serving.app import build_app
from llmtrain.infer.serving.asked import ServingLimits
from llmtrain.infer.serving.batch_thread import BatchThread
from llmtrain.infer.serving.service import Service
from llmtrain.infer.text_model import TextModel
from tests.support.held_batch import HeldBatch
from tests.support.hf_folders import write_llama

ROOM = 3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TextModel:
    folder = write_llama(tmp_path_factory.mktemp("model") / "llama")
    return TextModel(load_model(folder, torch.device("cpu")))


@pytest.fixture
def held(model: TextModel) -> Iterator[tuple[HeldBatch, BatchThread, Starlette]]:
    batch = HeldBatch()
    thread = BatchThread(batch, ROOM)
    limits = ServingLimits(max_tokens=50, max_body=1000, body_seconds=0.05)
    yield batch, thread, build_app(Service(model, "tiny", thread, limits), key=None)
    thread.stop()


def client_of(app: Starlette) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://tiny/v1")


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0)


async def call(
    app: Starlette, content: object, receive: Callable[[], Awaitable[Message]] | None = None
) -> list[Message]:
    """What an ASGI server is told for one completion; `receive` follows the body."""
    body, sent = json.dumps(content).encode(), list[Message]()
    parts: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
    scope = {
        "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "method": "POST",
        "path": "/v1/completions", "raw_path": b"/v1/completions", "query_string": b"", "root_path": "",
        "scheme": "http", "headers": [], "client": ("a", 1), "server": ("b", 2),
    }  # fmt: skip

    async def received() -> Message:
        if parts:
            return parts.pop()
        return await receive() if receive else await asyncio.Future()

    async def send(message: Message) -> None:
        sent.append(message)

    await app(scope, received, send)
    return sent


Held = tuple[HeldBatch, BatchThread, Starlette]


def test_a_full_queue_says_when_to_come_back(held: Held) -> None:
    batch, thread, app = held

    async def work() -> None:
        async with client_of(app) as client:
            waiting = asyncio.ensure_future(client.post("/completions", json={"prompt": "a", "n": 2}))
            await until(lambda: thread.num_open == 2)
            refused = await client.post("/completions", json={"prompt": "a", "n": 2})
            assert refused.status_code == 429 and refused.headers["retry-after"] == "1"
            assert refused.json()["error"]["type"] == "rate_limit_error"
            assert thread.num_open == 2, "none of the two was taken"
            other = asyncio.ensure_future(client.post("/completions", json={"prompt": "a", "n": 1}))
            await until(lambda: len(batch.texts) == 3)
            waiting.cancel()
            other.cancel()

    asyncio.run(work())


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_has_left_before_the_answer_begins_frees_its_texts(held: Held, stream: bool) -> None:
    batch, thread, app = held

    async def leave() -> Message:
        return {"type": "http.disconnect"}

    async def work() -> None:
        await call(app, {"prompt": "a", "n": 2, "stream": stream}, leave)
        await until(lambda: not batch.texts and thread.num_open == 0)
        assert batch.added in (0, 2)

    asyncio.run(work())


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_texts(held: Held, stream: bool) -> None:
    batch, thread, app = held

    async def work() -> None:
        left = asyncio.Event()

        async def leave() -> Message:
            await left.wait()
            return {"type": "http.disconnect"}

        task = asyncio.ensure_future(call(app, {"prompt": "a", "n": 2, "stream": stream}, leave))
        await until(lambda: len(batch.texts) == 2)
        for _ in range(3):
            batch.go.release()
        left.set()
        await task
        await until(lambda: not batch.texts and thread.num_open == 0)

    asyncio.run(work())


def test_a_model_that_fails_is_told_without_its_secrets(held: Held) -> None:
    batch, _, app = held

    async def work() -> None:
        async with client_of(app) as client:
            waiting = asyncio.ensure_future(client.post("/completions", json={"prompt": "a"}))
            await until(lambda: len(batch.texts) == 1)
            batch.fails = True
            batch.go.release()
            answer = await waiting
            assert answer.status_code == 503 and "secret" not in answer.text
            assert (await client.post("/completions", json={"prompt": "a"})).status_code == 503
            assert (await client.get("http://tiny/health")).status_code == 503
            assert (await client.post("/embeddings", json={"input": "a"})).status_code == 503

    asyncio.run(work())


def test_a_body_that_does_not_arrive_is_not_waited_for(held: Held) -> None:
    _, _, app = held

    async def slowly() -> AsyncIterator[bytes]:
        yield b'{"prompt": '
        await asyncio.sleep(60)

    async def work() -> None:
        async with client_of(app) as client:
            assert (await client.post("/completions", content=slowly())).status_code == 408

    asyncio.run(work())


def test_bodies_are_cut_off_where_they_are_too_large(held: Held) -> None:
    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield b"a" * 100

    async def work() -> None:
        async with client_of(held[2]) as client:
            for content in (endless(), b"a" * 1001):
                answer = await client.post("/completions", content=content)
                assert answer.status_code == 413 and "1,000 bytes" in answer.text

    asyncio.run(work())


def test_paths_that_are_none_say_which_there_are(held: Held) -> None:
    async def work() -> None:
        async with client_of(held[2]) as client:
            for method, path, status in (("GET", "/responses", 404), ("GET", "/completions", 405)):
                answer: Any = await client.request(method, path)
                assert answer.status_code == status and "/v1/completions" in answer.json()["error"]["message"]

    asyncio.run(work())
