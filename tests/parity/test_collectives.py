"""What a training step sends between ranks: calls and bytes of every collective equal docs/communication.md.

Each term is a line of `expected_megatron`, `expected_torch` or `block_calls`; nothing is left over on either side.
"""

from math import lcm
from typing import Any

import pytest
import torch

from llmtrain.checks.parity.batches import probe_batches
from llmtrain.config.schema import RunConfig
from llmtrain.parallel.layout import Layout, plan_layout
from llmtrain.train.setup import engine_class
from tests.parity.cases import parity_run
from tests.parity.communication import (
    COUNT_BYTES,
    FP32_BYTES,
    Calls,
    block_calls,
    held_parameters,
    hidden_bytes,
    micro_batches_of_rank,
)
from tests.support.collectives import Collectives
from tests.support.ranks import run_ranks


def counted_rank(rank: int, world_size: int, config: RunConfig) -> Calls:
    layout = plan_layout(config.parallel, world_size)
    data = (layout.coordinates(rank).data, layout.data)
    engine = engine_class(config.engine.name)(config, torch.device("cpu"))
    with Collectives() as collectives:
        engine.train_step(1, probe_batches(config, 1, *data), 1e-3)
    return collectives.calls


def padded(sizes: list[int], ranks: int) -> int:
    """Elements of megatron-core's sharded buffer: each parameter begins at a multiple of 64, the end at one of all."""
    total = 0
    for size in reversed(sizes):
        total = -(-total // 64) * 64 + size
    unit = lcm(ranks, 128)
    return -(-total // unit) * unit


def expected_megatron(config: RunConfig, layout: Layout, stage: int) -> Calls:
    model, calls = config.model, block_calls(config, layout, stage)
    micro_batches = micro_batches_of_rank(config, layout)
    first, last = stage == 0, stage == layout.pipeline - 1
    held = held_parameters(config, layout, stage)

    # The step: the number of targets before; the loss and the square of the gradient norm after, in one.
    calls["all_reduce", COUNT_BYTES] += 1
    calls["all_reduce", 2 * COUNT_BYTES] += 1

    # Pipeline: one message per micro-batch and direction at each boundary; under sequence parallel a part of it.
    boundaries = (not first) + (not last)
    if boundaries:
        message = hidden_bytes(config, layout) // (layout.tensor if layout.sequence else 1)
        calls["send", message] += micro_batches * boundaries
        if model.tie_embeddings and (first or last):
            word = next(size for name, size in held if name == "embeddings.word.weight")
            calls["all_reduce", word * FP32_BYTES] += 1

    # Data (and context): the gradients; under ZeRO 1 their shards, and the weights back. There a weight that lives on
    # two pipeline stages has a buffer of its own, so that it is cut at the same places on both.
    if config.engine.zero_stage:
        twice = "embeddings.word.weight" if boundaries and model.tie_embeddings else ""
        buffers = [[size for name, size in held if name != twice], [size for name, size in held if name == twice]]
        for sizes in filter(None, buffers):
            buffer = padded(sizes, layout.data * layout.context) * FP32_BYTES
            calls["reduce_scatter", buffer] += 1
            calls["all_gather", buffer] += 1
    else:
        calls["all_reduce", sum(size for _, size in held) * FP32_BYTES] += 1
    return calls


def expected_torch(config: RunConfig, layout: Layout, stage: int) -> Calls:
    elements = sum(size for _, size in held_parameters(config, layout, stage))
    # The number of targets before; all gradients; the loss and the square of the gradient norm after, in one.
    sizes = (COUNT_BYTES, elements * FP32_BYTES, 2 * COUNT_BYTES)
    return Calls({("all_reduce", size): 1 for size in sizes})


CASES: list[tuple[str, dict[str, Any], int]] = [
    ("torch", {}, 0),
    ("megatron", {}, 0),
    ("megatron", {}, 1),
    ("megatron", {"tensor": 2}, 0),
    ("megatron", {"tensor": 2, "sequence": True}, 1),
    ("megatron", {"pipeline": 2}, 0),
    ("megatron", {"context": 2}, 1),
    ("megatron", {"context": 4, "context_exchange": "ring"}, 1),
    ("megatron", {"context": 2, "tensor": 2, "sequence": True}, 1),
    ("megatron", {"pipeline": 2, "tensor": 2, "sequence": True}, 1),
    ("megatron", {"pipeline": 2, "tensor": 2, "sequence": True, "pipeline_schedule": "zero_bubble"}, 1),
]


@pytest.mark.parametrize(("engine", "parallel", "zero_stage"), CASES, ids=[f"{e}-{p}-{z}" for e, p, z in CASES])
def test_every_call_and_byte_is_in_the_table(engine: str, parallel: dict[str, Any], zero_stage: int) -> None:
    config = parity_run("llama").with_keys({"engine": {"name": engine, "zero_stage": zero_stage}, "parallel": parallel})
    world_size = max(2, parallel.get("tensor", 1) * parallel.get("context", 1) * parallel.get("pipeline", 1))
    layout = plan_layout(config.parallel, world_size)
    expected = {"torch": expected_torch, "megatron": expected_megatron}[engine]
    for rank, calls in enumerate(run_ranks(counted_rank, world_size, config)):
        assert calls == expected(config, layout, layout.coordinates(rank).pipeline), f"rank {rank}"
