"""`llmtrain serve` and `eval` of a model that several ranks hold: the answers of one process, and deaths of ranks."""

import json
import signal
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
import torch

from llmtrain.infer.batching.sampling import Sampling
from llmtrain.infer.generate import continued
from llmtrain.infer.model import load_model
from llmtrain.infer.prompt_file import Writing
from llmtrain.infer.text_model import TextModel
from tests.support.command import TIMEOUT_SECONDS, llmtrain
from tests.support.evaluated_run import write_lines
from tests.support.hf_folders import write_bert, write_llama
from tests.support.servers import KEY, Server, served

LAYOUTS = [
    "parallel.tensor=2 parallel.pipeline=2",
    pytest.param("parallel.tensor=2", marks=pytest.mark.whole_grid),
    pytest.param("parallel.pipeline=2 launch.num_workers=2", marks=pytest.mark.whole_grid),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("served") / "llama")


def client_of(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url, api_key=KEY, max_retries=0, timeout=TIMEOUT_SECONDS)


def ranks_of(server: Server) -> list[psutil.Process]:
    return psutil.Process(server.process.pid).children(recursive=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_answers_are_those_of_one_process_and_a_stop_ends_all_ranks(layout: str, folder: Path) -> None:
    model = TextModel(load_model(folder, torch.device("cpu")))

    def alone(prompt: str, temperature: float) -> str:
        how = Writing(Sampling(temperature, seed=1), max_tokens=20)
        return "".join(continued(model, model.continuation(prompt), how)).removesuffix("\n")

    with served(folder, *layout.split(), "--slots", "3") as server:
        client, ranks = client_of(server), ranks_of(server)
        asked: dict[str, Any] = {"model": "llama", "max_tokens": 20, "seed": 1}
        texts = client.completions.create(prompt=["the quick", "a b", "def "], temperature=0, **asked).choices
        assert [choice.text for choice in texts] == [alone(prompt, 0) for prompt in ("the quick", "a b", "def ")]
        drawn = client.completions.create(prompt="the quick", temperature=0.8, logprobs=2, **asked).choices[0]
        assert drawn.text == alone("the quick", 0.8)
        stream = client.completions.create(prompt="the quick", temperature=0.8, stream=True, **asked)
        text = next(iter(stream)).choices[0].text
        embedded = client.embeddings.create(model="llama", input="the fox", encoding_format="float").data[0].embedding
        assert embedded == pytest.approx(model.embedding(model.framed("the fox")), abs=1e-5)
        with pytest.raises(openai.BadRequestError, match=r"model\.max_seq_len"):
            client.embeddings.create(model="llama", input="the " * 100)
        server.process.send_signal(signal.SIGTERM)
        assert text + "".join(piece.choices[0].text for piece in stream) == drawn.text
        assert server.process.wait(TIMEOUT_SECONDS) == 0
    assert not psutil.wait_procs(ranks, TIMEOUT_SECONDS)[1]


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "busy"])
def test_the_death_of_a_rank_is_told_to_clients_and_ends_the_command(busy: bool, folder: Path) -> None:
    keys = "parallel.tensor=2" if busy else "parallel.pipeline=2"
    with served(folder, keys, "--slots", "2") as server:
        client, (rank,) = client_of(server), ranks_of(server)
        asked: dict[str, Any] = {"model": "llama", "prompt": "a", "max_tokens": 60, "temperature": 0}
        # Two texts are being written, and another two wait.
        streams = [client.completions.create(**asked, stream=True) for _ in range(4 * busy)]
        for stream in streams[:2]:
            next(iter(stream))
        rank.kill()
        for stream in streams:
            with pytest.raises(openai.APIError, match="The model has failed"):
                list(stream)
        assert server.process.wait(TIMEOUT_SECONDS) == 1
    told = (folder.parent / "server.txt").read_text()
    assert "error: rank 1 on " in told and "was killed by SIGKILL" in told


def test_the_end_of_the_server_is_the_end_of_its_ranks(folder: Path) -> None:
    with served(folder, "parallel.tensor=2") as server:
        ranks = ranks_of(server)
        server.process.kill()
        assert ranks and not psutil.wait_procs(ranks, TIMEOUT_SECONDS)[1]


@pytest.mark.whole_grid
def test_an_encoder_on_two_ranks_fills_masks(tmp_path: Path) -> None:
    model = TextModel(load_model(write_bert(tmp_path / "bert"), torch.device("cpu")))
    with served(tmp_path / "bert", "parallel.tensor=2") as server:
        (masks,) = server.post("/fill-mask", {"input": "the [MASK] fox", "top_k": 3}).json()["data"][0]["masks"]
    (filling,) = model.fillings("the [MASK] fox", 3)[1]
    assert [each["token"] for each in masks] == [token for token, _ in filling.tokens]


TASKS = """tasks:
  - {name: pick, kind: choices, data: data.jsonl, prompt: 'Q: {q}', choices: ['{c}'], answer: '{a}'}
  - {name: gap, kind: cloze, data: data.jsonl, prompt: 'Q: {q}', answer: '{c.0}'}
  - {name: say, kind: qa, data: data.jsonl, prompt: 'Q: {q}', answer: '{c}', max_tokens: 6}
  - {name: text, kind: perplexity, data: data.jsonl, prompt: '{q}', max_length: 8}
"""


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_evaluation_finds_what_one_process_finds(layout: str, folder: Path, tmp_path: Path) -> None:
    rows = [{"q": f"the fox {number} jumps", "c": ["over it", "a dog"], "a": number % 2} for number in range(5)]
    write_lines(tmp_path / "data.jsonl", rows)
    (tmp_path / "tasks.yaml").write_text(TASKS, "utf-8")
    asked = ("eval", folder, "--tasks", "tasks.yaml", "--device", "cpu", "--json")
    told = list[dict[str, Any]]()
    for name, keys in (("one", []), ("ranks", layout.split())):
        done = llmtrain(*asked, *keys, "--out", f"{name}.jsonl", folder=tmp_path)
        assert done.returncode == 0, done.stderr
        told.append(json.loads(done.stdout)["tasks"])
    one, ranks = (
        {(task, name): value for task, said in each.items() for name, value in said["metrics"].items()} for each in told
    )
    assert ranks == {key: pytest.approx(value, rel=1e-4) for key, value in one.items()}
    assert all(ranks[key] == value for key, value in one.items() if "accuracy" in key[1] or "match" in key[1])
    # What one of them has begun, the other goes on with: nothing in the file depends on the layout.
    again = llmtrain(*asked, "--out", "ranks.jsonl", folder=tmp_path)
    assert again.returncode == 0 and json.loads(again.stdout)["tasks"] == told[1]


def test_keys_are_refused_before_anything_starts(folder: Path, tmp_path: Path) -> None:
    for verb in (("serve", folder), ("eval", folder, "--tasks", "tasks.yaml")):
        (tmp_path / "tasks.yaml").write_text(TASKS, "utf-8")
        done = llmtrain(*verb, "parallel.tensor=3", "parallel.context=2", folder=tmp_path)
        assert done.returncode == 2
        assert "parallel.tensor = 3 (command line): must divide model.num_heads" in done.stderr
        assert "parallel.context (command line): has no meaning in decoding" in done.stderr
    done = llmtrain("serve", folder, "parallel.tensor=4", "model.num_heads=8", "--exact", folder=tmp_path)
    assert done.returncode == 2
    assert "--exact (command line): does not go with parallel.tensor = 4" in done.stderr
    assert "model (command line): follows from the model" in done.stderr
