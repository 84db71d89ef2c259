"""What each engine adds to a bare PyTorch loop with one rank, each in a process of its own."""

import os
import time
from collections.abc import Callable
from itertools import count, cycle
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from llmtrain.checks.parity.rank_pool import Forks
from llmtrain.config.schema import RunConfig
from llmtrain.engines.base import Engine
from llmtrain.models.transformer import build_model
from llmtrain.train.setup import engine_class
from tests.benchmarks import overhead, step
from tests.benchmarks.measuring import Measurement, Options, Row, Table, measure
from tests.benchmarks.peer_models import PlainGPT, Shape, random_tokens
from tests.benchmarks.step import LEARNING_RATE, as_batch, gpt2_run
from tests.support.weights import materialize

CPU = torch.device("cpu")
BARE, SAME_MODEL, OURS = "bare PyTorch loop", "bare loop around llmtrain's model", "torch"
ENGINES: dict[str, dict[str, Any]] = {
    OURS: {"name": "torch"},
    "megatron": {"name": "megatron"},
    "deepspeed, zero 0": {"name": "deepspeed", "zero_stage": 0},
    "deepspeed, zero 1": {"name": "deepspeed", "zero_stage": 1},
}
"""Contenders and their `engine` section; the two bare loops have none."""

IMPORTED = (
    "tests.benchmarks.engines",
    "llmtrain.engines.torch_engine",
    "llmtrain.engines.megatron_engine",
    "llmtrain.engines.deepspeed_engine",
)
NUM_BATCHES = 8

Step = Callable[[], object]


def benchmark(options: Options) -> list[Table]:
    """CPU milliseconds per step in fp32 and one thread, of a tiny model and of the step benchmark's."""
    forks = Forks(IMPORTED)
    tiny_steps, large, large_steps = (20, step.QUICK, 1) if options.quick else (600, step.FULL, 1)
    tiny = step_times(forks, overhead.SHAPE, tiny_steps, options.rounds)
    title = f"Engines, one rank, {described(overhead.SHAPE)}"
    added = tuple(row.minus(tiny[0], f"{row.name}: added to the bare loop") for row in tiny[1:])
    return [
        Table(title, "ms/step", "lower", OURS, tiny),
        Table(f"{title}, differences within a round", "ms/step", "lower", None, added),
        Table(
            f"Engines, one rank, {described(large)}", "ms/step", "lower", OURS,
            step_times(forks, large, large_steps, options.rounds),
        ),
    ]  # fmt: skip


def described(shape: Shape) -> str:
    return f"layers {shape.num_layers}, width {shape.hidden_size}, {shape.tokens_per_step} tokens a step"


def step_times(forks: Forks, shape: Shape, steps: int, rounds: int) -> tuple[Row, ...]:
    """The bare loop first. Every measurement is a fresh process that warms itself up, so no round is left out.

    megatron-core and DeepSpeed keep state in their modules: one process cannot hold two of the contenders.
    """

    def measurement(name: str) -> Measurement:
        return lambda: forks.run(milliseconds_per_step, 1, name, shape, steps)[0]

    return measure({name: measurement(name) for name in (BARE, *ENGINES, SAME_MODEL)}, rounds, warm_up=0)


def milliseconds_per_step(rank: int, world_size: int, name: str, shape: Shape, steps: int) -> float:
    """The median step's CPU time in this process, all of its threads, after a tenth as many steps of warm-up."""
    os.dup2(2, 1)  # what libraries print does not belong among the tables
    if name not in ENGINES or ENGINES[name]["name"] == "torch":
        dist.destroy_process_group()  # in a run of one rank they have none
    do_step = build_step(name, shape)
    for _ in range(max(1, steps // 10)):
        do_step()
    times = []
    for _ in range(steps):
        started = time.process_time()
        do_step()
        times.append(time.process_time() - started)
    return 1e3 * median(times)


def build_step(name: str, shape: Shape) -> Step:
    """One optimizer step of a contender on the next of a few random batches."""
    if name in ENGINES:
        return engine_step(gpt2_run(shape, {"engine": ENGINES[name]}), shape)
    return plain_step(shape) if name == BARE else same_model_step(gpt2_run(shape), shape)


def engine_step(config: RunConfig, shape: Shape) -> Step:
    engine: Engine = engine_class(config.engine.name)(config, CPU)
    supply, numbers = cycle([[as_batch(tokens)] for tokens in random_tokens(shape, NUM_BATCHES)]), count(1)
    return lambda: engine.train_step(next(numbers), next(supply), LEARNING_RATE)


def plain_step(shape: Shape) -> Step:
    """A GPT-2 of an afternoon and everything that a step needs."""
    model = PlainGPT(shape)
    supply = cycle(random_tokens(shape, NUM_BATCHES))

    def loss() -> torch.Tensor:
        tokens = next(supply)
        return model(tokens[:, :-1], tokens[:, 1:])

    return bare_step(model, loss)


def same_model_step(config: RunConfig, shape: Shape) -> Step:
    """The engines' model with PyTorch's own loss: what an engine adds beside another model."""
    model = build_model(config.model)
    materialize(model, config.seed, CPU)
    supply = cycle([as_batch(tokens) for tokens in random_tokens(shape, NUM_BATCHES)])

    def loss() -> torch.Tensor:
        batch = next(supply)
        hidden, _ = model(batch)
        return F.cross_entropy(model.logits(hidden).flatten(0, 1), batch.labels_BS.flatten())

    return bare_step(model, loss)


def bare_step(model: torch.nn.Module, next_loss: Callable[[], torch.Tensor]) -> Step:
    """Forward, backward, clip, fused AdamW."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)

    def do_step() -> float:
        loss = next_loss()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return do_step
