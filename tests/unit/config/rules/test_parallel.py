"""What the axes divide: what breaks a rule, that what it suggests is legal, and that the layout takes what is legal."""

import re
from itertools import product
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from llmtrain.config.schema import ParallelConfig
from llmtrain.parallel.layout import plan_chunks, plan_layout
from tests.unit.config.small_run import broken, run

MEGATRON = {"name": "megatron"}


def wide(**sections: Any) -> dict[str, str]:
    """What a run on the megatron engine breaks, on just enough ranks for its axes."""
    config = run(engine=MEGATRON, **sections)
    return broken(config, config.parallel.replica_size)


@pytest.mark.parametrize(
    ("sections", "key", "says"),
    [
        ({"parallel": {"tensor": 3}}, "parallel.tensor", "must divide model.num_heads = 4 and model.num_kv_heads = 4"),
        ({"parallel": {"tensor": 3}}, "parallel.tensor", "Try 1, 2 or 4."),
        (
            {"model": {"num_kv_heads": 2}, "parallel": {"tensor": 4}},
            "parallel.tensor",
            "must divide model.num_kv_heads = 2. Try 1 or 2.",
        ),
        (
            {"model": {"ffn_hidden_size": 130}, "parallel": {"tensor": 4}},
            "parallel.tensor",
            "must divide model.ffn_hidden_size = 130. Try 1 or 2.",
        ),
        (
            {"model": {"num_heads": 6, "head_dim": 8, "ffn_hidden_size": 96}, "parallel": {"tensor": 3}},
            "parallel.tensor",
            "must divide the vocabulary's padding = 128. Try 1 or 2.",
        ),
        (
            {"model": {"ffn_hidden_size": 130, "moe": {"num_experts": 4}}, "parallel": {"tensor": 4}},
            "parallel.tensor",
            "must divide model.ffn_hidden_size = 130. Try 1 or 2.",
        ),
        (
            {"parallel": {"context": 3, "context_exchange": "heads"}},
            "parallel.context",
            "4 / 1 = 4. Try 1, 2 or 4, or parallel.context_exchange=ring.",
        ),
        (
            {"parallel": {"tensor": 2, "context": 4, "context_exchange": "heads"}},
            "parallel.context",
            "4 / 2 = 2. Try 1 or 2, or",
        ),
        (
            {"model": {"attention": {"kind": "linear"}}, "parallel": {"tensor": 2, "context": 4}},
            "parallel.context",
            "4 / 2 = 2. Try 1 or 2.",
        ),
        (
            {"model": {"attention": {"kind": "linear"}}, "parallel": {"context": 2, "context_exchange": "ring"}},
            "parallel.context_exchange",
            "model.attention.kind = linear has no softmax, whose parts could be joined. Try heads.",
        ),
        (
            {"parallel": {"context_exchange": "ring"}},
            "parallel.context_exchange",
            "needs parallel.context greater than 1. Try null.",
        ),
        ({"parallel": {"sequence": True}}, "parallel.sequence", "Try false."),
        (
            {"data": {"seq_len": 65}, "parallel": {"context": 2}},
            "data.seq_len",
            "must be a multiple of parallel.context = 2. Try 64 or 66.",
        ),
        (
            {"data": {"seq_len": 126}, "parallel": {"tensor": 2, "context": 2, "sequence": True}},
            "data.seq_len",
            "parallel.context x parallel.tensor = 2 x 2 = 4. Try 124 or 128.",
        ),
        (
            {"data": {"seq_len": 1}, "model": {"max_seq_len": 1}, "parallel": {"context": 2}},
            "data.seq_len",
            "Try parallel.context=1.",
        ),
        ({"parallel": {"virtual_pipeline": 2}}, "parallel.virtual_pipeline", "needs parallel.pipeline"),
        (
            {"parallel": {"pipeline_schedule": "zero_bubble"}},
            "parallel.pipeline_schedule",
            "orders the work of pipeline stages, and parallel.pipeline = 1. Try null, or parallel.pipeline=2.",
        ),
        (
            {"parallel": {"pipeline": 2, "virtual_pipeline": 2, "pipeline_schedule": "zero_bubble"}},
            "parallel.pipeline_schedule",
            "one chunk per stage, and parallel.virtual_pipeline = 2. Try null, or parallel.virtual_pipeline=1.",
        ),
        ({"parallel": {"pipeline": 5}}, "parallel.pipeline", "at most model.num_layers = 4. Try 4."),
        (
            {"parallel": {"pipeline": 2, "virtual_pipeline": 3}},
            "parallel.virtual_pipeline",
            "gives 6 chunks for model.num_layers = 4. Try 2 or less.",
        ),
        (
            {"parallel": {"pipeline": 2, "pipeline_split": [4]}},
            "parallel.pipeline_split",
            "must have 2 entries, one per chunk (parallel.pipeline x parallel.virtual_pipeline = 2 x 1). Try [2, 2]",
        ),
        (
            {"parallel": {"pipeline": 3, "pipeline_split": [1, 1, 1]}},
            "parallel.pipeline_split",
            "must sum to model.num_layers = 4, and sums to 3. Try [2, 1, 1]",
        ),
        (
            {"parallel": {"pipeline": 3, "pipeline_split": [2, 0, 2]}},
            "parallel.pipeline_split",
            "only the first and the last chunk",
        ),
        (
            {"train": {"global_batch_size": 12}, "parallel": {"pipeline": 2, "virtual_pipeline": 2}},
            "train.global_batch_size",
            "gives each rank 3 micro-batches, and interleaved stages (parallel.virtual_pipeline = 2) need a multiple",
        ),
        (
            {"train": {"global_batch_size": 4}, "parallel": {"pipeline": 2, "virtual_pipeline": 2}},
            "train.global_batch_size",
            "parallel.pipeline = 2. Try 8, or parallel.virtual_pipeline=1.",
        ),
        ({"parallel": {"expert": 2}}, "parallel.expert", "Try 1."),
    ],
)
def test_rule_is_broken(sections: dict[str, Any], key: str, says: str) -> None:
    assert says in wide(**sections)[key]


@pytest.mark.parametrize(
    "sections",
    [
        {"parallel": {"tensor": 2, "sequence": True, "context": 2}},
        {"model": {"num_kv_heads": 1}, "parallel": {"context": 4}},
        {"parallel": {"tensor": 2, "context": 4}},
        {"data": {"seq_len": 63}, "parallel": {"context": 3}},
        {"model": {"attention": {"kind": "linear"}}, "parallel": {"context": 2, "context_exchange": "heads"}},
        {"model": {"ffn_hidden_size": 130, "moe": {"ffn_hidden_size": 64}}, "parallel": {"tensor": 4}},
        {"parallel": {"pipeline": 4}, "train": {"global_batch_size": 4}},
        {"parallel": {"pipeline": 2, "virtual_pipeline": 2}},
        {"parallel": {"pipeline": 4, "pipeline_schedule": "zero_bubble"}, "train": {"global_batch_size": 4}},
        {"parallel": {"pipeline": 3, "pipeline_split": [0, 4, 0]}},
        {"parallel": {"pipeline": 2, "virtual_pipeline": 2, "pipeline_split": [0, 2, 2, 0]}},
        {"parallel": {"pipeline": 6, "pipeline_split": [0, 1, 1, 1, 1, 0]}},
        {"data": {"seq_len": 63}, "parallel": {"tensor": 2}},
    ],
)
def test_rules_allow(sections: dict[str, Any]) -> None:
    assert wide(**sections) == {}


@pytest.mark.parametrize(
    ("model", "parallel", "exchange", "balanced"),
    [
        ({}, {"context": 2}, "heads", False),
        ({}, {"context": 3}, "ring", True),
        ({}, {"tensor": 2, "context": 4}, "ring", True),
        ({}, {"context": 2, "context_exchange": "ring"}, "ring", True),
        ({}, {"context": 3, "context_exchange": "heads"}, "heads", False),
        ({"attention": {"kind": "linear"}}, {"context": 3}, "heads", False),
        ({"attention": {"kind": "sliding_window", "window": 8}}, {"context": 3}, "ring", False),
        ({"attention": {"kind": "strided", "stride": 8}}, {"context": 3}, "ring", True),
        ({"family": "encoder"}, {"context": 3}, "ring", False),
        ({"family": "encoder_decoder", "num_encoder_layers": 4}, {"context": 3}, "ring", True),
        ({}, {}, "heads", False),
    ],
)
def test_heads_are_dealt_out_where_they_can_be_and_causal_rings_are_balanced(
    model: dict[str, Any], parallel: dict[str, Any], exchange: str, balanced: bool
) -> None:
    config = run(engine=MEGATRON, model=model, parallel=parallel)
    assert (config.context_exchange, config.balances_context) == (exchange, balanced)


def test_axes_must_divide_the_world() -> None:
    config = run(engine=MEGATRON, parallel={"tensor": 2, "pipeline": 2})
    message = broken(config, world_size=6)["launch.num_workers"]
    assert message.endswith("= 4 ranks. Try 4 or 8, or parallel.pipeline=1.")
    assert "launch.num_workers" not in broken(config, world_size=8)


def test_micro_batches_of_one_are_named_where_more_ranks_than_samples_ask_for_a_larger_batch() -> None:
    message = broken(run(), world_size=1024)["train.global_batch_size"]
    assert message.endswith("Try 4096, or 1024 with train.micro_batch_size=1.")


def test_micro_batches_count_data_parallel_ranks() -> None:
    assert broken(run(), world_size=2) == {}
    assert "4 x 4 = 16" in broken(run(), world_size=4)["train.global_batch_size"]


AXES = st.fixed_dictionaries(
    {
        "tensor": st.integers(1, 6),
        "pipeline": st.integers(1, 6),
        "virtual_pipeline": st.integers(1, 3),
        "context": st.integers(1, 6),
        "sequence": st.booleans(),
    }
)


def test_what_breaks_no_rule_can_be_laid_out() -> None:
    """No size that a layout or a stage divides leaves a rest, over all small meshes."""
    base = run(engine=MEGATRON, model={"num_layers": 6}, train={"global_batch_size": 96})
    model, num_legal = base.model, 0
    for tensor, pipeline, virtual, context, data in product(
        range(1, 6), range(1, 7), (1, 2, 3), range(1, 6), range(1, 5)
    ):
        sizes = {"tensor": tensor, "pipeline": pipeline, "virtual_pipeline": virtual, "context": context}
        parallel = ParallelConfig(**sizes, sequence=tensor > 1)
        config = base.with_keys({"parallel": parallel})
        if broken(config, parallel.replica_size * data):
            continue
        num_legal += 1
        layout = plan_layout(parallel, parallel.replica_size * data)
        chunks = [chunk for rank in range(pipeline) for chunk in plan_chunks(layout, 6, None, rank)]
        assert sorted(layer for chunk in chunks for layer in chunk.layers) == list(range(6))
        assert all(chunk.layers for chunk in chunks)
        for size in (model.num_heads, model.kv_heads, model.ffn_size, 128):
            assert size % tensor == 0
        assert config.context_exchange == "ring" or model.num_heads % (tensor * context) == 0
        assert config.data.seq_len % layout.sequence_parts == 0
        micro_batches, rest = divmod(96, config.train.micro_batch_size * data)
        assert rest == 0 and (virtual == 1 or micro_batches % pipeline == 0)
    assert num_legal > 100


@settings(deadline=None)
@given(AXES, st.integers(1, 64))
def test_suggested_worlds_and_axes_are_legal(axes: dict[str, Any], world_size: int) -> None:
    message = broken(run(engine=MEGATRON, parallel=axes), world_size).get("launch.num_workers")
    assume(message is not None)
    worlds, _, axis = str(message).split("Try ")[1].rstrip(".").partition(", or parallel.")
    for world in map(int, re.findall(r"\d+", worlds)):
        assert "launch.num_workers" not in broken(run(engine=MEGATRON, parallel=axes), world)
    if axis:
        name, _, size = axis.partition("=")
        changed = broken(run(engine=MEGATRON, parallel={**axes, name: int(size)}), world_size)
        assert "launch.num_workers" not in changed and f"parallel.{name}" not in changed


@settings(deadline=None)
@given(st.integers(1, 64), st.integers(1, 16), st.integers(1, 5))
def test_suggested_batch_sizes_are_legal(batch: int, micro: int, world_size: int) -> None:
    sizes = {"global_batch_size": batch, "micro_batch_size": micro}
    message = broken(run(train=sizes), world_size).get("train.global_batch_size")
    assume(message is not None)
    advice, *micros = str(message).split("Try")[1].split("for train.micro_batch_size")
    smallest = re.search(r", or ([\d or]+) with train\.micro_batch_size=1", advice)
    for legal in map(int, re.findall(r"\d+", smallest[1] if smallest else "")):
        assert broken(run(train={"global_batch_size": legal, "micro_batch_size": 1}), world_size) == {}
    for legal in map(int, re.findall(r"\d+", advice[: smallest.start()] if smallest else advice)):
        assert broken(run(train={**sizes, "global_batch_size": legal}), world_size) == {}
    for legal in map(int, re.findall(r"\d+", "".join(micros))):
        assert broken(run(train={**sizes, "micro_batch_size": legal}), world_size) == {}
