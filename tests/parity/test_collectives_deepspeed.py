"""What a training step on the deepspeed engine sends between ranks equals docs/communication.md, call by call.

Counted is the second step: in the first one stage 3 compares between ranks in which order modules are used.
"""

from typing import Any

import pytest
import torch

from llmtrain.checks.parity.batches import probe_batches
from llmtrain.config.schema import RunConfig
from llmtrain.models.transformer import build_model
from llmtrain.parallel.layout import Layout, plan_layout
from llmtrain.train.setup import engine_class
from tests.parity.cases import parity_run
from tests.parity.communication import (
    BF16_BYTES,
    COUNT_BYTES,
    FP32_BYTES,
    Calls,
    block_calls,
    held_parameters,
    micro_batches_of_rank,
)
from tests.support.collectives import Collectives
from tests.support.ranks import run_ranks

Keys = dict[str, Any]

WHOLE = "stage3_param_persistence_threshold"
FROM_100 = {WHOLE: 100}
"""As in a model with many weights above the bound: only norms stay whole on every rank."""

RELEASED = {**FROM_100, "stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}
"""As in a model far larger than what DeepSpeed keeps and fetches ahead (1e9 elements): each weight goes after use."""


def counted_rank(rank: int, world_size: int, config: RunConfig, keys: Keys) -> Calls:
    from llmtrain.engines.deepspeed_engine import setup

    ours = setup.zero_keys
    setup.zero_keys = lambda config, device: {**ours(config, device), **keys}
    layout = plan_layout(config.parallel, world_size)
    data = (layout.coordinates(rank).data, layout.data)
    engine = engine_class(config.engine.name)(config, torch.device("cpu"))
    engine.train_step(1, probe_batches(config, 1, *data), 1e-3)
    with Collectives() as collectives:
        engine.train_step(2, probe_batches(config, 2, *data), 1e-3)
    return collectives.calls


def padded(elements: int, unit: int) -> int:
    return -(-elements // unit) * unit


def expected_calls(config: RunConfig, layout: Layout, keys: Keys) -> Calls:
    calls = block_calls(config, layout, 0)
    # The step: the number of targets before; the loss and the square of the gradient norm after, in one.
    calls["all_reduce", COUNT_BYTES] += 1
    calls["all_reduce", 2 * COUNT_BYTES] += 1
    if config.engine.zero_stage == 3:
        return calls + partitioned_calls(config, layout, keys)
    return calls + flattened_calls(config, layout)


def flattened_calls(config: RunConfig, layout: Layout) -> Calls:
    """Stages 0 to 2. All gradients fit in one bucket."""
    calls, zero_stage, bf16 = Calls(), config.engine.zero_stage, config.train.precision == "bf16"
    held = held_parameters(config, layout, 0)
    # Gradients, whole on every rank: once per step, in stage 2 once per micro-batch.
    times = micro_batches_of_rank(config, layout) if zero_stage == 2 else 1
    calls["all_reduce", sum(size for _, size in held) * FP32_BYTES] += times
    # Weights: a buffer of those that decay and one of the others, each padded to two elements per rank.
    ranks = layout.data * layout.context
    if zero_stage and ranks > 1:
        vectors = {name for name, parameter in build_model(config.model).named_parameters() if parameter.dim() < 2}
        for decays in (True, False):
            elements = sum(size for name, size in held if (name not in vectors) == decays)
            calls["all_gather", padded(elements, 2 * ranks) * (BF16_BYTES if bf16 else FP32_BYTES)] += 1
    # A norm of DeepSpeed's own, of which it knows only the tensor axis.
    if zero_stage == 1 and bf16:
        calls["all_reduce", FP32_BYTES] += 1
    return calls


def partitioned_calls(config: RunConfig, layout: Layout, keys: Keys) -> Calls:
    """Stage 3. Every parameter is padded to a multiple of the ranks."""
    calls, ranks, micro_batches = Calls(), layout.data * layout.context, micro_batches_of_rank(config, layout)
    held = [(name, padded(size, ranks)) for name, size in held_parameters(config, layout, 0)]
    # Gradients, of each micro-batch.
    calls["reduce_scatter", sum(size for _, size in held) * FP32_BYTES] += micro_batches
    # DeepSpeed's own norms, of what decays and of what does not; across the tensor axis once more.
    calls["all_reduce", COUNT_BYTES] += 2 * (1 + (layout.tensor > 1))
    if ranks == 1:
        return calls
    weight_bytes = BF16_BYTES if config.train.precision == "bf16" else FP32_BYTES
    bound = keys.get(WHOLE, 100_000)
    # Small parameters, whole between steps: gathered after the update, one by one.
    calls.update(("all_gather", size * weight_bytes) for _, size in held if size <= bound)
    # The others, in each micro-batch.
    parted = [(name, size * weight_bytes) for name, size in held if size > bound]
    if keys == RELEASED:  # forward and again backward, a module at a time
        for _, nbytes in parted:
            calls["all_gather", nbytes] += 2 * micro_batches
    elif parted:  # once: what the whole model holds itself, its tied head, and all that is fetched ahead meanwhile
        head = sum(nbytes for name, nbytes in parted if name == "embeddings.word.weight")
        calls["all_gather", head] += micro_batches
        calls["all_gather", sum(nbytes for _, nbytes in parted) - head] += micro_batches
    return calls


SEQUENCE = {"tensor": 2, "sequence": True}

SHORT: list[tuple[str, int, dict[str, Any], int, str, Keys]] = [
    ("llama", 2, {}, 1, "fp32", {}),
    ("llama", 2, {}, 2, "fp32", {}),
    ("llama", 2, {}, 3, "fp32", FROM_100),
    ("llama", 2, {"tensor": 2}, 0, "fp32", {}),
    ("llama", 2, SEQUENCE, 2, "fp32", {}),
    ("llama", 2, SEQUENCE, 3, "fp32", RELEASED),
    ("llama", 2, {"context": 2}, 2, "fp32", {}),
    ("llama", 2, {}, 1, "bf16", {}),
    ("llama", 2, {}, 3, "bf16", FROM_100),
    ("gpt", 3, {}, 3, "fp32", {}),
]
REST: list[tuple[str, int, dict[str, Any], int, str, Keys]] = [
    ("llama", 2, {}, 0, "fp32", {}),
    ("llama", 2, {}, 3, "fp32", {}),
    ("llama", 2, {}, 3, "fp32", RELEASED),
    ("llama", 2, {"tensor": 2}, 1, "fp32", {}),
    ("llama", 2, {"tensor": 2}, 3, "fp32", {}),
    ("llama", 2, {"context": 2}, 3, "fp32", RELEASED),
    ("llama", 2, {}, 0, "bf16", {}),
    ("llama", 2, {}, 2, "bf16", {}),
    ("gpt", 3, {}, 1, "fp32", {}),
]
"""Model, ranks, parallel section, ZeRO stage, precision, DeepSpeed's keys. Little in "gpt" divides by three."""


def run_of(model: str, ranks: int, parallel: dict[str, Any], zero_stage: int, precision: str) -> RunConfig:
    config = parity_run(model, precision)
    if ranks == 3:
        config = config.with_keys({"train.global_batch_size": 12})
    return config.with_keys({"engine": {"name": "deepspeed", "zero_stage": zero_stage}, "parallel": parallel})


def case(values: tuple[str, int, dict[str, Any], int, str, Keys], *marks: Any) -> Any:
    model, ranks, parallel, zero_stage, precision, keys = values
    return pytest.param(*values, id=f"{model}-{ranks}-{parallel}-{zero_stage}-{precision}-{len(keys)}", marks=marks)


@pytest.mark.parametrize(
    ("model", "ranks", "parallel", "zero_stage", "precision", "keys"),
    [*map(case, SHORT), *(case(others, pytest.mark.whole_grid) for others in REST)],
)
def test_every_call_and_byte_is_in_the_table(
    model: str, ranks: int, parallel: dict[str, Any], zero_stage: int, precision: str, keys: Keys
) -> None:
    config = run_of(model, ranks, parallel, zero_stage, precision)
    expected = expected_calls(config, plan_layout(config.parallel, ranks), keys)
    for rank, calls in enumerate(run_ranks(counted_rank, ranks, config, keys)):
        assert calls == expected, f"rank {rank}"


@pytest.mark.parametrize("zero_stage", [1, 2])
def test_a_norm_that_nobody_reads_would_be_seen(zero_stage: int) -> None:
    config = run_of("llama", 2, {}, zero_stage, "fp32")
    expected = expected_calls(config, plan_layout(config.parallel, 2), {})
    for calls in run_ranks(counted_rank, 2, config, {"compute_grad_norm": True}):
        assert calls - expected == Calls({("all_reduce", FP32_BYTES): 2})
        assert not expected - calls
