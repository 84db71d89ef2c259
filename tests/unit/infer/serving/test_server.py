"""The key of a server, and what an encoder is asked."""

import asyncio
import json
import logging
import signal
import socket
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from llmtrain.errors import ConfigError
from llmtrain.infer.batching.batch import ContinuousBatch
from llmtrain.infer.batching.scheduler import Limits
from llmtrain.infer.model import load_model
from llmtrain.infer.serving.app import build_app
from llmtrain.infer.serving.asked import ServingLimits
from llmtrain.infer.serving.batch_thread import BatchThread
from llmtrain.infer.serving.callers import LocalCallers, serving_key
from llmtrain.infer.serving.server import open_port, run_server
from llmtrain.infer.serving.service import Service
from llmtrain.infer.text_model import TextModel
from tests.support.hf_folders import write_bert, write_gpt2

LONG = "a key of 20 letters."


@pytest.mark.parametrize(
    ("content", "variable", "host", "told"),
    [
        (None, None, "0.0.0.0", "a key is needed"),
        (None, "short", "127.0.0.1", "LLMTRAIN_API_KEY: the key has 5 characters"),
        ("short\n", None, "127.0.0.1", "must have at least 16"),
        ("", LONG, "::", "the key has 0 characters"),
    ],
)
def test_keys_that_are_refused(content: str | None, variable: str | None, host: str, told: str, tmp_path: Path) -> None:
    file = None if content is None else tmp_path / "key"
    if file is not None and content is not None:
        file.write_text(content)
    with pytest.raises(ConfigError) as caught:
        serving_key(file, variable, host)
    assert told in str(caught.value) and LONG not in str(caught.value)


def test_keys_that_are_taken(tmp_path: Path) -> None:
    (tmp_path / "key").write_text(f"{LONG}\n")
    assert serving_key(tmp_path / "key", "other", "0.0.0.0") == LONG
    assert serving_key(None, LONG, "0.0.0.0") == LONG
    assert serving_key(None, None, "127.0.0.1") is None
    with pytest.raises(ConfigError, match="cannot be read"):
        serving_key(tmp_path / "nowhere", None, "127.0.0.1")


def test_it_listens_before_it_tells_its_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("signal.signal", lambda *_: None)
    told = list[str]()

    def called(address: str) -> None:
        told.append(address)
        socket.create_connection(("127.0.0.1", int(address.split(":")[2].partition("/")[0]))).close()

    with open_port("127.0.0.1", 0) as bound:
        run_server(Starlette(), bound, 0, called, lambda: True)
    assert len(told) == 1


def test_ports_and_hosts_that_cannot_be_had() -> None:
    with open_port("localhost", 0) as bound:
        bound.listen()
        taken = bound.getsockname()[1]
        with pytest.raises(ConfigError, match=f"--port {taken}: is in use on localhost"):
            open_port("localhost", taken)
    with pytest.raises(ConfigError, match=r"--host no\.such\.name\.invalid: is no address"):
        open_port("no.such.name.invalid", 0)
    with pytest.raises(ConfigError, match=r"--host 192\.0\.2\.1: is no address of this machine"):
        open_port("192.0.2.1", 0)


def test_without_a_key_only_names_of_this_machine_are_answered() -> None:
    app = LocalCallers(Starlette(routes=[Route("/", lambda request: Response("hello"))]))
    client = TestClient(app)
    for host in ("localhost:8000", "127.0.0.1", "[::1]:8000"):
        for more in ({}, {"Origin": f"http://{host}"}):
            assert client.get("/", headers={"Host": host, **more}).text == "hello"
    wrong = [{"Host": "evil.example:8000"}, {"Host": "localhost.evil.example"}, {"Host": "[::1"}]
    wrong += [{"Host": "localhost", "Origin": origin} for origin in ("https://evil.example", "null", "")]
    for headers in wrong:
        answer = client.get("/", headers=headers)
        assert answer.status_code == 403 and "--key-file" in answer.json()["error"]["message"], headers


@pytest.mark.parametrize(("drain", "signals"), [(0, 1), (3600, 2)], ids=["too long", "told twice"])
def test_calls_that_are_cut_off_get_an_error(
    drain: int, signals: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """503 where an answer has not begun, an event where it streams, and nobody a broken connection."""
    handlers, begun, answers = dict[int, Any](), threading.Semaphore(0), dict[str, tuple[int, str]]()
    monkeypatch.setattr("signal.signal", lambda number, handler: handlers.setdefault(number, handler))

    async def hangs(request: Request) -> Response:
        begun.release()
        return await asyncio.Future()

    async def events() -> AsyncIterator[bytes]:
        yield b"data: 1\n\n"
        begun.release()
        await asyncio.Future()

    async def streams(request: Request) -> Response:
        return StreamingResponse(events(), media_type="text/event-stream")

    def ask(address: str, path: str) -> None:
        answer = httpx.get(address.removesuffix("/v1") + path, timeout=60)
        answers[path] = (answer.status_code, answer.text)

    def ask_and_stop(address: str) -> None:
        asking = [threading.Thread(target=ask, args=(address, path)) for path in ("/hangs", "/stream")]
        for each in asking:
            each.start()
        assert begun.acquire(timeout=60) and begun.acquire(timeout=60)
        for _ in range(signals):
            handlers[signal.SIGTERM](signal.SIGTERM, None)
        for each in asking:
            each.join()

    def told(address: str) -> None:
        clients.append(threading.Thread(target=ask_and_stop, args=(address,)))
        clients[0].start()

    clients = list[threading.Thread]()
    caplog.set_level(logging.INFO)
    with open_port("127.0.0.1", 0) as bound:
        run_server(
            Starlette(routes=[Route("/hangs", hangs), Route("/stream", streams)]), bound, drain, told, lambda: False
        )
    clients[0].join()
    status, body = answers["/hangs"]
    assert status == 503 and json.loads(body)["error"]["code"] == "server_stopped"
    status, body = answers["/stream"]
    first, error, rest = body.split("\n\n")
    assert (status, first, rest) == (200, "data: 1", "")
    assert json.loads(error.removeprefix("data: "))["error"]["type"] == "server_error"
    assert f"2 calls may take {drain} s more" in caplog.text and "2 calls had not ended" in caplog.text


def test_a_model_without_a_template_names_what_may_be_asked(tmp_path: Path) -> None:
    model = TextModel(load_model(write_gpt2(tmp_path / "gpt2"), torch.device("cpu")))
    thread = BatchThread(ContinuousBatch(model.model, Limits.of(model.config, 1)), 1)
    client = TestClient(build_app(Service(model, "gpt2", thread, ServingLimits(50)), key=None))
    asked = {"model": "gpt2", "messages": [{"role": "user", "content": "hi"}]}
    answer = client.post("/v1/chat/completions", json=asked)
    assert answer.status_code == 404 and "Ask /v1/completions" in answer.text and str(tmp_path) not in answer.text
    thread.stop()


def test_an_encoder_fills_masks_and_embeds(tmp_path: Path) -> None:
    model = TextModel(load_model(write_bert(tmp_path / "bert"), torch.device("cpu")))
    thread = BatchThread(ContinuousBatch(model.model, Limits.of(model.config, 1)), 1)
    client = TestClient(build_app(Service(model, "bert", thread, ServingLimits(50)), key=None))
    name, fillings = model.fillings("the [MASK] fox", 3)
    assert name == "[MASK]"
    answer = client.post("/v1/fill-mask", json={"input": ["the [MASK] fox"], "top_k": 3}).json()
    (mask,) = answer["data"][0]["masks"]
    assert [entry["token"] for entry in mask] == [token for token, _ in fillings[0].tokens]
    found = client.post("/v1/embeddings", json={"input": "the fox", "encoding_format": "float"}).json()
    assert len(found["data"][0]["embedding"]) == model.config.hidden_size
    assert found["usage"]["prompt_tokens"] == len(model.framed("the fox"))
    assert client.post("/v1/fill-mask", json={"input": "no mask"}).status_code == 400
    assert "/v1/fill-mask" in client.post("/v1/completions", json={"prompt": "a"}).json()["error"]["message"]
    thread.stop()
