"""The key of a server, and what an encoder is asked."""

import socket
from pathlib import Path

import pytest
import torch
from starlette.applications import Starlette
from starlette.testclient import TestClient

from llmtrain.errors import ConfigError
from llmtrain.infer.batching.batch import ContinuousBatch
from llmtrain.infer.batching.scheduler import Limits
from llmtrain.infer.model import load_model
from llmtrain.infer.serving.app import build_app
from llmtrain.infer.serving.asked import ServingLimits
from llmtrain.infer.serving.batch_thread import BatchThread
from llmtrain.infer.serving.server import run_server, serving_key
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

    run_server(Starlette(), ("127.0.0.1", 0), 0, called, lambda: True)
    assert len(told) == 1


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
