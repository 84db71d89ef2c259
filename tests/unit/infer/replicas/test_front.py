"""The app in front of replicas: calls go elsewhere where one is full or dies, and everything is freed."""

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping
from typing import Any

import httpx
import pytest
import torch

from llmtrain.infer.model import load_model
from llmtrain.infer.replicas.calls import AnswerHead, Balance, LostError, PassedCall
from llmtrain.infer.replicas.front import build_front
from llmtrain.infer.replicas.relay import relayed
from llmtrain.infer.serving.app import build_app
from llmtrain.infer.serving.asked import ServingLimits
from llmtrain.infer.serving.batch_thread import BatchThread
from llmtrain.infer.serving.open_calls import OpenCalls
from llmtrain.infer.serving.service import Service
from llmtrain.infer.text_model import TextModel
from tests.support.held_batch import HeldBatch
from tests.support.hf_folders import write_llama

KEY = "a key of a test, long enough"
HEADERS = {"Authorization": f"Bearer {KEY}"}
ROOM = 3
LIMITS = ServingLimits(max_tokens=50, max_body=1000, body_seconds=0.05)


class HeldReplicas:
    """Replicas of this process, each with a batch of its own. One that is killed takes its calls along."""

    def __init__(self, model: TextModel, names: str = "ab") -> None:
        self.batches = {name: HeldBatch() for name in names}
        self.threads = {name: BatchThread(batch, ROOM) for name, batch in self.batches.items()}
        services = {name: Service(model, "tiny", thread, LIMITS) for name, thread in self.threads.items()}
        self.apps = {name: build_app(service, None) for name, service in services.items()}
        self._services, self._balance = services, Balance()
        self._dead = {name: asyncio.Event() for name in names}
        self.calls = list[tuple[str, PassedCall]]()
        self.least = len(names)

    @property
    def living(self) -> list[str]:
        return [name for name, dead in self._dead.items() if not dead.is_set()]

    @property
    def num_ready(self) -> int:
        return len(self.living)

    def kill(self, name: str) -> None:
        self._dead[name].set()

    async def ask(self, call: PassedCall) -> AsyncGenerator[AnswerHead | bytes, None]:
        name = self._balance.order(call, self.living)[0]
        self.calls.append((name, call))
        parts = relayed(self.apps[name], call, name)
        dead = asyncio.ensure_future(self._dead[name].wait())
        try:
            while True:
                part = asyncio.ensure_future(anext(parts, None))
                await asyncio.wait([part, dead], return_when=asyncio.FIRST_COMPLETED)
                if dead.done():
                    part.cancel()
                    raise LostError(name)
                if (found := part.result()) is None:
                    return
                yield found
        finally:
            dead.cancel()
            if not part.done():
                part.cancel()
            await asyncio.wait([part])
            await parts.aclose()

    async def figures(self) -> Mapping[str, str]:
        return {name: self._services[name].metrics.text().decode() for name in self.living}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TextModel:
    folder = write_llama(tmp_path_factory.mktemp("model") / "llama")
    return TextModel(load_model(folder, torch.device("cpu")))


@pytest.fixture
def replicas(model: TextModel) -> Iterator[HeldReplicas]:
    made = HeldReplicas(model)
    yield made
    for thread in made.threads.values():
        thread.stop()


def run(
    replicas: HeldReplicas,
    work: Callable[[httpx.AsyncClient], Awaitable[None]],
    app: OpenCalls | None = None,
) -> None:
    """Do something as a client of a front; then no replica has a text on its way, and no call counts."""

    async def whole() -> None:
        transport = httpx.ASGITransport(app or build_front(replicas, LIMITS, KEY))
        async with httpx.AsyncClient(transport=transport, base_url="http://tiny/v1", headers=HEADERS) as client:
            await work(client)
            await until(lambda: not any(batch.texts for batch in replicas.batches.values()))
        assert [call.outstanding for _, call in replicas.calls] == [0] * len(replicas.calls)

    asyncio.run(whole())


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0)


def events(text: str) -> list[Any]:
    found = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    return [each if each == "[DONE]" else json.loads(each) for each in found]


def test_an_answer_is_the_replicas(replicas: HeldReplicas) -> None:
    async def work(client: httpx.AsyncClient) -> None:
        for batch in replicas.batches.values():
            batch.go.release(12)
        answer = await client.post("/completions", json={"prompt": "a", "max_tokens": 8})
        assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 8
        stream = await client.post(
            "/chat/completions", json={"messages": [{"role": "user", "content": "a"}], "stream": True, "max_tokens": 4}
        )
        parts = events(stream.text)
        assert stream.headers["content-type"].startswith("text/event-stream") and parts[-1] == "[DONE]"
        assert parts[0]["choices"][0]["delta"]["role"] == "assistant"
        assert (await client.get("/models")).json()["data"][0]["id"] == "tiny"
        for path, content, status in (
            ("/completions", b"{", 400),
            ("/completions", b"a" * 1001, 413),
            ("/nowhere", b"", 404),
        ):
            refused = await client.post(path, content=content)
            assert refused.status_code == status and "message" in refused.json()["error"]

    run(replicas, work)


def test_the_key_is_kept_in_front(replicas: HeldReplicas) -> None:
    async def work(client: httpx.AsyncClient) -> None:
        for headers in ({"Authorization": "Bearer wrong"}, {"Authorization": ""}):
            assert (await client.post("/completions", json={"prompt": "a"}, headers=headers)).status_code == 401
            assert (await client.get("/models", headers=headers)).status_code == 401
            assert (await client.get("http://tiny/metrics", headers=headers)).status_code == 401
        assert replicas.calls == []
        await client.get("/models")
        assert KEY not in repr(replicas.calls) and len(replicas.calls) == 1

    run(replicas, work)


def test_what_one_has_no_room_for_another_takes_and_then_nobody(replicas: HeldReplicas) -> None:
    async def work(client: httpx.AsyncClient) -> None:
        def ask(count: int) -> "asyncio.Future[httpx.Response]":
            return asyncio.ensure_future(
                client.post("/completions", json={"prompt": [1], "n": count, "max_tokens": 50})
            )

        first, second = ask(2), ask(3)
        await until(lambda: [len(batch.texts) for batch in replicas.batches.values()] == [2, 3])
        full = await ask(2)
        assert full.status_code == 429 and full.headers["retry-after"] == "1"
        assert full.json()["error"]["code"] == "queue_full"
        assert [name for name, _ in replicas.calls[2:]] == ["a", "b"], "both were asked"
        third = ask(1)
        await until(lambda: [len(batch.texts) for batch in replicas.batches.values()] == [3, 3])
        for batch in replicas.batches.values():
            batch.go.release(50)
        assert [(await each).status_code for each in (first, second, third)] == [200, 200, 200]

    run(replicas, work)


def test_a_call_of_which_nothing_has_come_survives_its_replica(replicas: HeldReplicas) -> None:
    async def work(client: httpx.AsyncClient) -> None:
        asked = [{"prompt": "a", "max_tokens": 5, "stream": stream} for stream in (False, True)]
        asked.append({"messages": [{"role": "user", "content": "a"}], "max_tokens": 5, "stream": True})
        paths = ["/completions", "/completions", "/chat/completions"]
        waiting = [asyncio.ensure_future(client.post(path, json=each)) for path, each in zip(paths, asked, strict=True)]
        await until(lambda: sum(len(batch.texts) for batch in replicas.batches.values()) == 3)
        replicas.kill("a")
        await until(lambda: len(replicas.batches["b"].texts) == 3)
        replicas.batches["b"].go.release(5)
        answers = [await each for each in waiting]
        assert [answer.status_code for answer in answers] == [200, 200, 200]
        assert events(answers[1].text)[-1] == events(answers[2].text)[-1] == "[DONE]"

    run(replicas, work)


def test_a_stream_that_has_begun_ends_with_an_error(replicas: HeldReplicas) -> None:
    async def work(client: httpx.AsyncClient) -> None:
        def ask() -> "asyncio.Future[httpx.Response]":
            return asyncio.ensure_future(
                client.post("/completions", json={"prompt": "a", "max_tokens": 5, "stream": True})
            )

        lost, kept = ask(), ask()
        await until(lambda: all(len(batch.texts) == 1 for batch in replicas.batches.values()))
        replicas.batches["a"].go.release(2)
        await until(lambda: replicas.calls[0][1].outstanding < replicas.calls[1][1].outstanding)
        replicas.kill("a")
        *begin, end = events((await lost).text)
        assert begin and "[DONE]" not in begin
        assert end["error"]["code"] == "replica_lost" and end["error"]["type"] == "server_error"
        replicas.batches["b"].go.release(5)
        assert events((await kept).text)[-1] == "[DONE]"

    run(replicas, work)


def test_a_call_that_replicas_die_with_is_given_up(model: TextModel) -> None:
    replicas = HeldReplicas(model, "abc")

    async def work(client: httpx.AsyncClient) -> None:
        asked = asyncio.ensure_future(client.post("/completions", json={"prompt": "a"}))
        for name in "ab":
            await until(lambda name=name: len(replicas.batches[name].texts) == 1)
            replicas.kill(name)
        assert (await asked).status_code == 503
        assert len(replicas.calls) == 2, "the last one is spared"
        replicas.kill("c")
        answer = await client.post("/completions", json={"prompt": "a"})
        assert answer.status_code == 503 and answer.headers["retry-after"] == "1"

    run(replicas, work)
    for thread in replicas.threads.values():
        thread.stop()


@pytest.mark.parametrize("tokens", [0, 2])
def test_a_client_that_leaves_frees_its_texts_in_the_replica(replicas: HeldReplicas, tokens: int) -> None:
    async def work(client: httpx.AsyncClient) -> None:
        body = json.dumps({"prompt": "a", "n": 2, "max_tokens": 50, "stream": bool(tokens)}).encode()
        left, sent = asyncio.Event(), list[bytes]()
        parts = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Any:
            if parts:
                return parts.pop()
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message.get("body", b""))

        headers = [(b"authorization", f"Bearer {KEY}".encode())]
        scope = {
            "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "method": "POST",
            "path": "/v1/completions", "raw_path": b"/v1/completions", "query_string": b"", "root_path": "",
            "scheme": "http", "headers": headers, "client": ("a", 1), "server": ("b", 2),
        }  # fmt: skip
        app = build_front(replicas, LIMITS, KEY)
        task = asyncio.ensure_future(app(scope, receive, send))
        await until(lambda: len(replicas.batches["a"].texts) == 2)
        for _ in range(tokens):
            replicas.batches["a"].go.release()
        await until(lambda: b"".join(sent).count(b"data: ") >= tokens)
        left.set()
        await task
        await until(lambda: replicas.threads["a"].num_open == 0)

    run(replicas, work)


def test_calls_that_are_cut_off_are_freed_in_the_replicas(replicas: HeldReplicas) -> None:
    calls = OpenCalls(build_front(replicas, LIMITS, KEY))

    async def work(client: httpx.AsyncClient) -> None:
        asked = [{"prompt": "a", "max_tokens": 50, "stream": stream} for stream in (False, True)]
        waiting = [asyncio.ensure_future(client.post("/completions", json=each)) for each in asked]
        await until(lambda: all(len(batch.texts) == 1 for batch in replicas.batches.values()))
        replicas.batches["b"].go.release()
        await until(lambda: replicas.calls[1][1].outstanding < replicas.calls[0][1].outstanding)
        assert calls.cut_off() == 2
        whole, stream = [await each for each in waiting]
        assert whole.status_code == 503 and whole.json()["error"]["code"] == "server_stopped"
        assert events(stream.text)[-1]["error"]["code"] == "server_stopped"

    run(replicas, work, calls)


def test_health_and_figures_are_of_all(replicas: HeldReplicas) -> None:
    async def work(client: httpx.AsyncClient) -> None:
        for batch in replicas.batches.values():
            batch.go.release(10)
        for _ in range(2):
            await client.post("/completions", json={"prompt": [1], "max_tokens": 2})
        page = (await client.get("http://tiny/metrics")).text
        lines = dict(line.rsplit(" ", 1) for line in page.splitlines() if not line.startswith("#"))
        assert lines['llmtrain_requests_total{path="/v1/completions",status="200"}'] == "2.0"
        assert sum(float(lines[f'llmtrain_new_tokens_total{{replica="{name}"}}']) for name in "ab") == 4
        assert lines["llmtrain_replicas"] == "2.0" and lines['llmtrain_room{replica="a"}'] == "3.0"
        assert 'llmtrain_first_token_seconds_bucket{le="+Inf",replica="a"}' in lines
        said = [(await client.get("http://tiny/health", headers={"Authorization": ""}))]
        for name in "ab":
            replicas.kill(name)
            said.append(await client.get("http://tiny/health"))
        assert [(answer.status_code, answer.json()["replicas"]) for answer in said] == [(200, 2), (200, 1), (503, 0)]
        assert said[0].json()["status"] == "ok" != said[1].json()["status"]

    run(replicas, work)
