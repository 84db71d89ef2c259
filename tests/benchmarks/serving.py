"""Writing texts: tokens per CPU second at several texts at a time beside transformers and llama.cpp, what a server adds
to its batch, and how long a text waits."""

import json
import random
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import httpx
import psutil
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llmtrain.infer.batching.batch import ContinuousBatch
from llmtrain.infer.batching.request import Request
from llmtrain.infer.batching.sampling import Sampling
from llmtrain.infer.batching.scheduler import Limits
from llmtrain.infer.model import load_model
from llmtrain.models.transformer import Transformer
from tests.benchmarks.measuring import Measurement, Options, Row, Table, measure, one_core
from tests.benchmarks.peer_models import Shape
from tests.benchmarks.serving_peers import (
    Prompts,
    continuous_batching,
    generate_speed,
    gguf_of,
    llama_cpp,
    load_peer,
)
from tests.benchmarks.step import OURS, clock
from tests.support.hf_folders import byte_level_tokenizer
from tests.support.servers import Server, served

SMALL = Shape(num_layers=4, hidden_size=128, num_heads=4, vocab_size=2048, seq_len=256, batch_size=16)
LARGE = Shape(num_layers=8, hidden_size=512, num_heads=8, vocab_size=8192, seq_len=256, batch_size=16)
QUICK = Shape(num_layers=2, hidden_size=64, num_heads=2, vocab_size=512, seq_len=64, batch_size=4)
AT_A_TIME = (1, 4, 8, 16)
SERVED_TOGETHER = 8
EXACT = f"{OURS}, exact"
SERVED, STREAMED = "llmtrain serve", "llmtrain serve, streamed"


@dataclass(frozen=True)
class Model:
    """A model as a Hugging Face folder, as a file for llama.cpp where that is installed, and what is asked of it: texts
    of `new` tokens."""

    folder: Path
    file: Path | None
    prompts: Prompts
    new: int
    ours: Transformer

    def told(self, slots: int) -> str:
        config = self.ours.config
        sizes = f"{config.num_layers} layers, {config.hidden_size} wide"
        return f"{slots} at a time ({sizes}, {len(self.prompts)} prompts, {self.new} new tokens each)"


def benchmark(options: Options) -> list[Table]:
    """In fp32, in one thread on a CPU; every text is as long as it may be."""
    tables = list[Table]()
    for shape in (QUICK,) if options.quick else (SMALL, LARGE):
        with tempfile.TemporaryDirectory() as place, one_core():
            folder = write_model(shape, Path(place, "model"))
            ours = load_model(folder, torch.device("cpu")).model
            model = Model(folder, gguf_of(folder), random_prompts(shape), shape.seq_len // 4, ours)
            for slots in AT_A_TIME[:2] if options.quick else AT_A_TIME:
                tables += [speeds(model, slots, options), latencies(model, slots, options.rounds)]
            tables.append(serving(model, options))
    return tables


def write_model(shape: Shape, folder: Path) -> Path:
    """A random Llama, whose tokenizer has fewer tokens than the model."""
    config = LlamaConfig(
        num_hidden_layers=shape.num_layers, hidden_size=shape.hidden_size, num_attention_heads=shape.num_heads,
        vocab_size=shape.vocab_size, max_position_embeddings=shape.seq_len, intermediate_size=3 * shape.hidden_size,
        tie_word_embeddings=True, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer = byte_level_tokenizer(["<|end|>"])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|end|>", eos_token="<|end|>", unk_token="<|end|>"
    ).save_pretrained(folder)
    return folder


def random_prompts(shape: Shape) -> Prompts:
    """Of different lengths, none like another."""
    rng = random.Random(0)
    lengths = [rng.randrange(8, shape.seq_len // 2) for _ in range(shape.batch_size)]
    return [tuple(rng.randrange(5, shape.vocab_size) for _ in range(length)) for length in lengths]


def speeds(model: Model, slots: int, options: Options) -> Table:
    prompts, new, peer = model.prompts, model.new, load_peer(model.folder)
    contenders: dict[str, Measurement] = {
        OURS: partial(batch_speed, model, slots, False),
        EXACT: partial(batch_speed, model, slots, True),
        "transformers, one at a time": partial(generate_speed, peer, prompts, new, 1),
    }
    with ExitStack() as peers:
        if slots > 1:
            contenders["transformers, padded together"] = partial(generate_speed, peer, prompts, new, slots)
            paged = peers.enter_context(continuous_batching(model.folder, slots, prompts, new))
            contenders["transformers, continuous batching"] = paged
        notes = () if model.file else ("llama.cpp was not run: make readers installs it",)
        if model.file is not None:
            contenders["llama.cpp, fp32"] = peers.enter_context(llama_cpp(model.file, slots, prompts, new))
        rows = measure(contenders, options.rounds)
    return Table(f"Texts, {model.told(slots)}", "tokens per CPU second", "higher", OURS, rows, notes)


def batch_speed(model: Model, slots: int, exact: bool) -> float:
    batch = ContinuousBatch(model.ours, Limits.of(model.ours.config, slots, exact=exact))
    for prompt in model.prompts:
        batch.add(Request(tuple(prompt), model.new, Sampling(temperature=0)))
    now = clock(torch.device("cpu"))
    begin = now()
    while not batch.is_idle:
        batch.step()
    return len(model.prompts) * model.new / (now() - begin)


def latencies(model: Model, slots: int, rounds: int) -> Table:
    """Seconds of the wall to the first token and between tokens, of texts that begin together: medians and p95."""
    first, between = list[float](), list[float]()
    for _ in range(rounds):
        batch = ContinuousBatch(model.ours, Limits.of(model.ours.config, slots))
        begin = time.perf_counter()
        requests = [Request(tuple(prompt), model.new, Sampling(temperature=0)) for prompt in model.prompts[:slots]]
        last = {batch.add(request): begin for request in requests}
        seen = set[int]()
        while not batch.is_idle:
            found = batch.step()
            now = time.perf_counter()
            for token in found:
                (between if token.request in seen else first).append(now - last[token.request])
                seen.add(token.request)
                last[token.request] = now
    rows = [
        Row(f"{name}, {told}", (1000 * sorted(values)[int(share * (len(values) - 1))],))
        for name, values in (("first token", first), ("next token", between))
        for told, share in (("median", 0.5), ("95 of 100", 0.95))
    ]
    return Table(f"Waiting for a token, {slots} texts at a time", "ms", "lower", None, tuple(rows))


def serving(model: Model, options: Options) -> Table:
    """What the process of a server computes for the same texts, which as many clients ask for as it has slots."""
    slots = SERVED_TOGETHER
    with served(model.folder, "--slots", str(slots)) as server, httpx.Client(headers=server.headers) as client:
        contenders: dict[str, Measurement] = {
            SERVED: partial(served_speed, server, client, model, False),
            STREAMED: partial(served_speed, server, client, model, True),
            "its batch alone": partial(batch_speed, model, slots, False),
        }
        rows = measure(contenders, options.rounds)
    return Table(f"A server, {model.told(slots)}", "tokens per CPU second", "higher", SERVED, rows)


def served_speed(server: Server, client: httpx.Client, model: Model, stream: bool) -> float:
    """Prompts are ids with a first one of their own each time: what a server remembers of a prompt is of no use."""
    process, fresh = psutil.Process(server.process.pid), random.randrange(5, model.ours.config.vocabulary)

    def write(prompt: tuple[int, ...]) -> int:
        question = {"prompt": [fresh, *prompt[1:]], "max_tokens": model.new, "temperature": 0, "stream": stream}
        if not stream:
            answer = client.post(f"{server.url}/completions", json=question, timeout=None)
            return answer.json()["usage"]["completion_tokens"]
        question["stream_options"] = {"include_usage": True}
        with client.stream("POST", f"{server.url}/completions", json=question, timeout=None) as lines:
            *_, last, _ = [line for line in lines.iter_lines() if line]
        return json.loads(last.removeprefix("data: "))["usage"]["completion_tokens"]

    before = process.cpu_times()
    with ThreadPoolExecutor(SERVED_TOGETHER) as clients:
        written = sum(clients.map(write, map(tuple, model.prompts)))
    after = process.cpu_times()
    return written / (after.user + after.system - before.user - before.system)
