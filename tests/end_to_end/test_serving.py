"""`llmtrain serve` as OpenAI's own client sees it, under abuse, and when it is told to stop."""

import json
import random
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import httpx
import openai
import pydantic
import pytest

from tests.support.command import TIMEOUT_SECONDS
from tests.support.hf_folders import write_llama
from tests.support.servers import KEY, Server, served


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("served") / "llama")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    with served(folder, "--slots", "4", "--max-queue", "8", "--max-tokens", "50", "--max-body", "100000") as found:
        yield found


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url, api_key=KEY, max_retries=0)


def completed(client: openai.OpenAI, prompt: Any = "the quick", **more: Any) -> Any:
    return client.completions.create(model="llama", prompt=prompt, **{"max_tokens": 8, "seed": 1, **more})


def chatted(client: openai.OpenAI, **more: Any) -> Any:
    messages: Any = [{"role": "system", "content": "a"}, {"role": "user", "content": "the quick"}]
    return client.chat.completions.create(model="llama", messages=messages, **{"max_tokens": 8, "seed": 1, **more})


def test_models_and_usage(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["llama"]
    answer = completed(client)
    assert answer.object == "text_completion" and answer.choices[0].finish_reason in ("stop", "length")
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.completion_tokens <= 8


def test_seeds_and_sampling(client: openai.OpenAI) -> None:
    assert completed(client).choices[0].text == completed(client).choices[0].text
    assert completed(client, seed=2).choices[0].text != completed(client).choices[0].text
    greedy = [completed(client, temperature=0, seed=seed).choices[0].text for seed in (1, 2)]
    assert greedy[0] == greedy[1] == completed(client, extra_body={"top_k": 1}).choices[0].text
    assert completed(client, top_p=1e-9).choices[0].text == greedy[0]
    assert completed(client, extra_body={"min_p": 0.999999}).choices[0].text == greedy[0]
    unseeded = {completed(client, seed=None).choices[0].text for _ in range(3)}
    assert len(unseeded) == 3


def test_several_texts_and_prompts(client: openai.OpenAI) -> None:
    three = completed(client, n=3).choices
    assert [choice.index for choice in three] == [0, 1, 2] and len({choice.text for choice in three}) == 3
    assert three[0].text == completed(client).choices[0].text, "the first of several is the one alone"
    pair = completed(client, ["the quick", "a b c"]).choices
    assert pair[0].text == three[0].text and pair[1].text == completed(client, "a b c").choices[0].text
    ids = completed(client, [[0, 40, 41], [0, 50]]).choices
    assert ids[1].text == completed(client, [0, 50]).choices[0].text
    assert completed(client, "the quick", echo=True).choices[0].text == "the quick" + three[0].text


def test_stop_strings_and_lengths(client: openai.OpenAI) -> None:
    whole = completed(client, max_tokens=30, temperature=0).choices[0]
    assert whole.finish_reason == "length"
    stop = whole.text[10:12]
    cut = completed(client, max_tokens=30, temperature=0, stop=[stop, "nowhere"]).choices[0]
    assert cut.text == whole.text[: whole.text.index(stop)] and cut.finish_reason == "stop"
    assert completed(client, max_tokens=None).usage.completion_tokens <= 16


def test_logprobs(client: openai.OpenAI) -> None:
    told = completed(client, logprobs=3, temperature=0).choices[0].logprobs
    assert len(told.tokens) == len(told.token_logprobs) == len(told.text_offset) == 8
    assert all(max(best.values()) == log for best, log in zip(told.top_logprobs, told.token_logprobs, strict=True))
    content = chatted(client, logprobs=True, top_logprobs=2, temperature=0).choices[0].logprobs.content
    assert all(entry.logprob == entry.top_logprobs[0].logprob and len(entry.top_logprobs) == 2 for entry in content)
    assert chatted(client, logprobs=True).choices[0].logprobs.content[0].top_logprobs == []


def test_chats(client: openai.OpenAI) -> None:
    answer = chatted(client)
    assert answer.object == "chat.completion" and answer.choices[0].message.role == "assistant"
    parts: Any = [{"role": "user", "content": [{"type": "text", "text": "the "}, {"type": "text", "text": "fox"}]}]
    plain: Any = [{"role": "user", "content": "the fox"}]
    texts = [
        client.chat.completions.create(model="llama", messages=messages, max_tokens=8, seed=1)
        .choices[0]
        .message.content
        for messages in (parts, plain)
    ]
    assert texts[0] == texts[1]
    tool: Any = {"type": "function", "function": {"name": "clock", "parameters": {}}}
    assert chatted(client, tools=[tool]).choices[0].message.content is not None
    assert chatted(client, response_format={"type": "text"}, n=2).choices[1].index == 1
    assert chatted(client, max_completion_tokens=2).usage.completion_tokens <= 2


def test_streams_are_the_whole_texts(client: openai.OpenAI) -> None:
    pieces = list(completed(client, stream=True, n=2, stream_options={"include_usage": True}))
    for index, choice in enumerate(completed(client, n=2).choices):
        parts = [each for piece in pieces for each in piece.choices if each.index == index]
        assert "".join(part.text for part in parts) == choice.text
        assert [part.finish_reason for part in parts if part.finish_reason] == [choice.finish_reason]
    assert pieces[-1].usage.completion_tokens == completed(client, n=2).usage.completion_tokens
    deltas = [piece.choices[0].delta for piece in chatted(client, stream=True)]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == chatted(client).choices[0].message.content
    logs = [piece.choices[0].logprobs for piece in chatted(client, stream=True, logprobs=True)]
    assert sum(len(each.content) for each in logs if each) == 8


def test_embeddings(client: openai.OpenAI) -> None:
    found = client.embeddings.create(model="llama", input=["the quick", "the quick fox"])  # as base64 on the way
    alone = client.embeddings.create(model="llama", input="the quick", encoding_format="float").data[0].embedding
    assert (
        found.data[0].embedding == pytest.approx(alone, abs=1e-6) and found.data[0].embedding != found.data[1].embedding
    )
    assert sum(value * value for value in alone) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("kind", "more", "told"),
    [
        (openai.NotFoundError, {"model": "other"}, "is not here"),
        (openai.BadRequestError, {"max_tokens": 51}, "at most 50"),
        (openai.BadRequestError, {"max_tokens": 0}, "max_tokens"),
        (openai.BadRequestError, {"temperature": -1}, "temperature"),
        (openai.BadRequestError, {"top_p": 0}, "top_p"),
        (openai.BadRequestError, {"n": 13}, "more texts than"),
        (openai.BadRequestError, {"stop": ["a"] * 17}, "stop"),
        (openai.BadRequestError, {"logit_bias": {"5": 1}}, "cannot do that"),
        (openai.BadRequestError, {"presence_penalty": 1}, "cannot do that"),
        (openai.BadRequestError, {"best_of": 3}, "best_of"),
        (openai.BadRequestError, {"prompt": "the " * 100}, "model.max_seq_len"),
        (openai.BadRequestError, {"prompt": []}, "prompt: the list is empty"),
        (openai.BadRequestError, {"prompt": [1, "a"]}, "prompt: must be a text, a list of texts, a list of ids"),
        (openai.BadRequestError, {"prompt": [[1], []]}, "prompt[1]: The prompt has 0 tokens"),
        (openai.BadRequestError, {"extra_body": {"stop": 5}}, "stop: must be a text or a list of texts"),
        (openai.BadRequestError, {"prompt": [10**9]}, "is no token"),
        (openai.BadRequestError, {"extra_body": {"max_token": 3}}, "no field that this server knows"),
        (openai.APIStatusError, {"prompt": "a" * 100_000}, "at most 100,000 bytes"),
    ],
    ids=range(18),
)
def test_errors_are_openais(client: openai.OpenAI, kind: type[openai.APIStatusError], more: Any, told: str) -> None:
    with pytest.raises(kind) as caught:
        client.completions.create(**{"model": "llama", "prompt": "a", **more})
    assert told in caught.value.message and isinstance(caught.value.body, dict) and "type" in caught.value.body
    assert caught.value.param is None or caught.value.param.isidentifier()


def test_a_chat_asks_for_what_is_not_done(client: openai.OpenAI) -> None:
    for more in ({"top_logprobs": 2}, {"tool_choice": "required"}):
        with pytest.raises(openai.BadRequestError):
            chatted(client, **more)


class Answer(pydantic.BaseModel):
    """Short enough to be whole in a few tokens."""

    yes: bool
    kind: Literal["a", "b"]


def test_answers_in_json(client: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "a"}]

    def parsed(seed: int) -> Any:
        answer = client.chat.completions.parse(
            model="llama", messages=messages, response_format=Answer, max_tokens=48, seed=seed
        ).choices[0]
        assert answer.finish_reason == "stop" and isinstance(answer.message.parsed, Answer), answer
        return answer.message.parsed

    assert len({str(parsed(seed)) for seed in range(8)}) > 1, "what the schema leaves open, the model says"
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": [7, "b", None]}, "strict": True}}
    several = chatted(client, response_format=schema, n=4).choices
    assert all(json.loads(choice.message.content) in (7, "b", None) for choice in several)
    stream = chatted(client, response_format=schema, stream=True)
    assert "".join(piece.choices[0].delta.content or "" for piece in stream) == several[0].message.content
    with pytest.raises(openai.BadRequestError, match="does not go with response_format"):
        chatted(client, response_format={"type": "json_object"}, stop="{")
    cut = chatted(client, response_format={"type": "json_object"}, max_tokens=2).choices[0]
    assert cut.message.content.startswith("{") and cut.finish_reason == "length"
    logs = chatted(client, response_format=schema, logprobs=True, top_logprobs=20).choices[0].logprobs.content
    assert "".join(bytes(entry.bytes).decode() for entry in logs) == several[0].message.content
    assert logs[0].logprob < logs[0].top_logprobs[0].logprob, "the model's own, not what the schema leaves"


@pytest.mark.parametrize(
    ("wanted", "told"),
    [
        ({"type": "xml"}, "response_format.type"),
        ({"type": "json_schema"}, "json_schema"),
        ({"type": "json_object", "json_schema": {"name": "x", "schema": {}}}, "json_schema"),
        ({"type": "json_schema", "json_schema": {"name": "x", "schema": []}}, "response_format.json_schema.schema"),
        ({"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "person"}}}, "Invalid type"),
        ({"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "http://127.0.0.1:9/x"}}}, "fetch"),
    ],
    ids=range(6),
)
def test_forms_that_are_refused(client: openai.OpenAI, wanted: Any, told: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        chatted(client, response_format=wanted)
    assert told in caught.value.message and caught.value.param.startswith("response_format")


def test_a_wrong_key_is_refused(server: Server) -> None:
    for key in ("wrong", KEY + "x"):
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=server.url, api_key=key, max_retries=0).models.list()
    for headers in ({}, {"Authorization": KEY.encode()[:-1]}, {"Authorization": b"Bearer \xff\xfe"}):
        assert httpx.get(f"{server.url}/models", headers=headers).status_code == 401
    assert httpx.get(f"{server.url.removesuffix('/v1')}/health").json() == {"status": "ok"}


def hostile(rng: random.Random, server: Server) -> None:
    """One call of somebody who means no good."""
    good: dict[str, Any] = {"prompt": "the", "max_tokens": rng.randrange(1, 50), "stream": rng.random() < 0.5}
    wrong = rng.choice(
        [None, True, -1, 1e308, "x", [], {}, [None], {"a": [1]}, "\ud800", "\0", 10**30, [[0]], [0, "a"]]
    )
    path = rng.choice(["/completions", "/chat/completions", "/embeddings", "/fill-mask"])
    match rng.randrange(6):
        case 0:
            good[rng.choice([*good, "n", "seed", "stop", "logprobs", "messages", "input", "model"])] = wrong
            body = json.dumps(good).encode()
        case 1:
            body = bytes(rng.randrange(256) for _ in range(rng.randrange(100)))
        case 2:
            body = b"[" * rng.choice([10, 5000, 90_000])
        case 3:
            body = b'{"prompt": "' + b"a" * 200_000
        case 4:
            body = json.dumps({"messages": [{"role": rng.choice(["user", "x"]), "content": wrong}]}).encode()
        case _:
            leave(rng, server, good)
            return
    try:
        answer = httpx.post(f"{server.url}{path}", content=body, headers=server.headers, timeout=TIMEOUT_SECONDS)
        assert answer.status_code < 500, answer.text
        assert answer.status_code == 200 or "error" in answer.json()
    except httpx.WriteError:
        pass  # it stopped to listen amid a body that is too large


def leave(rng: random.Random, server: Server, content: dict[str, Any]) -> None:
    """Ask, read a few bytes of the answer, or none, and go; or go amid the question."""
    host, port = server.url.removeprefix("http://").removesuffix("/v1").split(":")
    body = json.dumps(content).encode()
    said = len(body) + rng.choice([0, 0, 0, 5])
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Length: {said}\r\n\r\n"
    with socket.create_connection((host, int(port)), timeout=TIMEOUT_SECONDS) as connection:
        connection.sendall(head.encode() + body)
        if said == len(body):
            for _ in range(rng.randrange(4)):
                connection.recv(rng.choice([1, 100, 1000]))


@pytest.mark.parametrize("count", [60, pytest.param(1000, marks=pytest.mark.whole_grid)])
def test_nothing_that_is_sent_breaks_it(count: int, server: Server, client: openai.OpenAI) -> None:
    rng = random.Random(count)
    expected = completed(client, temperature=0).choices[0].text
    for _ in range(50):
        hostile(rng, server)
    before = server.resident_bytes()
    for _ in range(count):
        hostile(rng, server)
    server.wait_until_idle()
    assert completed(client, temperature=0).choices[0].text == expected
    assert server.resident_bytes() - before < 30 << 20
    assert server.process.poll() is None


def test_told_to_stop_it_ends_what_was_begun(folder: Path) -> None:
    with served(folder, "--slots", "2", "--name", "tiny") as server:
        client = openai.OpenAI(base_url=server.url, api_key=KEY, max_retries=0)
        expected = client.completions.create(model="tiny", prompt="a", max_tokens=60, seed=1).choices[0].text
        stream = client.completions.create(model="tiny", prompt="a", max_tokens=60, seed=1, stream=True)
        text = next(iter(stream)).choices[0].text
        server.process.send_signal(signal.SIGTERM)
        assert text + "".join(piece.choices[0].text for piece in stream) == expected
        assert server.process.wait(TIMEOUT_SECONDS) == 0
    assert KEY not in (folder.parent / "server.txt").read_text()
