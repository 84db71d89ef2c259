"""Writing texts: tokens per second at several texts at a time, beside transformers' generate, alone and padded."""

import random
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from llmtrain.config.model import ModelConfig
from llmtrain.infer.batching.batch import ContinuousBatch
from llmtrain.infer.batching.request import Request
from llmtrain.infer.batching.sampling import Sampling
from llmtrain.infer.batching.scheduler import Limits
from llmtrain.models.transformer import Transformer, build_model
from tests.benchmarks.measuring import Measurement, Options, Row, Table, measure, one_core
from tests.benchmarks.peer_models import Shape
from tests.benchmarks.step import OURS, clock
from tests.support.weights import materialize

SMALL = Shape(num_layers=4, hidden_size=128, num_heads=4, vocab_size=2048, seq_len=256, batch_size=16)
LARGE = Shape(num_layers=8, hidden_size=512, num_heads=8, vocab_size=8192, seq_len=256, batch_size=16)
QUICK = Shape(num_layers=2, hidden_size=64, num_heads=2, vocab_size=512, seq_len=64, batch_size=4)
AT_A_TIME = (1, 4, 8, 16)
EXACT = f"{OURS}, exact"
PEER, PADDED = "transformers, one at a time", "transformers, padded together"

Prompts = Sequence[tuple[int, ...]]


def benchmark(options: Options) -> list[Table]:
    """In fp32, in one thread on a CPU; every text is as long as it may be."""
    tables = []
    with one_core():
        for shape in (QUICK,) if options.quick else (SMALL, LARGE):
            model, theirs, prompts = ours(shape), peer(shape), random_prompts(shape)
            new = shape.seq_len // 4
            sizes = (
                f"{shape.num_layers} layers, {shape.hidden_size} wide, {len(prompts)} prompts, {new} new tokens each"
            )
            for slots in AT_A_TIME[:2] if options.quick else AT_A_TIME:
                contenders: dict[str, Measurement] = {
                    OURS: partial(our_speed, model, prompts, new, slots, False),
                    EXACT: partial(our_speed, model, prompts, new, slots, True),
                    PEER: partial(peer_speed, theirs, prompts, new, 1),
                }
                if slots > 1:
                    contenders[PADDED] = partial(peer_speed, theirs, prompts, new, slots)
                rows = measure(contenders, options.rounds)
                tables.append(
                    Table(f"Texts, {slots} at a time ({sizes})", "tokens per CPU second", "higher", OURS, rows)
                )
                tables.append(latencies(model, prompts, new, slots, options.rounds))
    return tables


def random_prompts(shape: Shape) -> Prompts:
    """Of different lengths, none like another."""
    rng = random.Random(0)
    lengths = [rng.randrange(8, shape.seq_len // 2) for _ in range(shape.batch_size)]
    return [tuple(rng.randrange(5, shape.vocab_size) for _ in range(length)) for length in lengths]


def ours(shape: Shape) -> Transformer:
    config = ModelConfig(
        num_layers=shape.num_layers, hidden_size=shape.hidden_size, num_heads=shape.num_heads,
        vocab_size=shape.vocab_size, max_seq_len=shape.seq_len, ffn_hidden_size=3 * shape.hidden_size,
    )  # fmt: skip
    model = build_model(config)
    materialize(model, seed=0, device=torch.device("cpu"))
    return model.eval()


def our_speed(model: Transformer, prompts: Prompts, new: int, slots: int, exact: bool) -> float:
    batch = ContinuousBatch(model, Limits.of(model.config, slots, exact=exact))
    for prompt in prompts:
        batch.add(Request(prompt, new, Sampling(temperature=0)))
    now = clock(torch.device("cpu"))
    begin = now()
    while not batch.is_idle:
        batch.step()
    return len(prompts) * new / (now() - begin)


def latencies(model: Transformer, prompts: Prompts, new: int, slots: int, rounds: int) -> Table:
    """Seconds of the wall to the first token and between tokens, of texts that begin together: medians and p95."""
    first, between = list[float](), list[float]()
    for _ in range(rounds):
        batch = ContinuousBatch(model, Limits.of(model.config, slots))
        begin = time.perf_counter()
        last = {batch.add(Request(prompt, new, Sampling(temperature=0))): begin for prompt in prompts[:slots]}
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


def peer(shape: Shape) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        num_hidden_layers=shape.num_layers, hidden_size=shape.hidden_size, num_attention_heads=shape.num_heads,
        vocab_size=shape.vocab_size, max_position_embeddings=shape.seq_len, intermediate_size=3 * shape.hidden_size,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.generation_config.eos_token_id = None
    return model


@torch.no_grad()
def peer_speed(model: Any, prompts: Prompts, new: int, together: int) -> float:
    """Prompts are padded on the left to the longest of those that go together."""
    now = clock(torch.device("cpu"))
    begin = now()
    for start in range(0, len(prompts), together):
        group = prompts[start : start + together]
        longest = max(map(len, group))
        ids = torch.tensor([[*[0] * (longest - len(prompt)), *prompt] for prompt in group])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in group])
        model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=new, pad_token_id=0)
    return len(prompts) * new / (now() - begin)
