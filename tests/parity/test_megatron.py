"""The megatron engine in every layout against one process."""

from dataclasses import replace
from typing import Any

import pytest

from llmtrain.checks.parity.compare import LOW_PRECISION, assemble_trace, compare, worst_tensor
from llmtrain.config.schema import RunConfig
from tests.parity.cases import parity_run, reference, short_and_whole, traced_rank, verdict
from tests.support.ranks import run_ranks
from tests.support.readers import require_torchao, use_torchao

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "dp2": (2, {}),
    "tp2": (2, {"tensor": 2}),
    "tp2+sp": (2, {"tensor": 2, "sequence": True}),
    "pp2": (2, {"pipeline": 2}),
    "pp2+vp2": (2, {"pipeline": 2, "virtual_pipeline": 2}),
    "cp2": (2, {"context": 2}),
    "cp4+ring": (4, {"context": 4, "context_exchange": "ring"}),
    "tp2+pp2": (4, {"tensor": 2, "pipeline": 2}),
    "tp2+sp+pp2+vp2": (4, {"tensor": 2, "sequence": True, "pipeline": 2, "virtual_pipeline": 2}),
    "dp2+tp2": (4, {"tensor": 2}),
    "dp2+tp2+sp": (4, {"tensor": 2, "sequence": True}),
    "dp2+pp2": (4, {"pipeline": 2}),
    "cp2+tp2": (4, {"context": 2, "tensor": 2}),
    "cp2+tp2+sp": (4, {"context": 2, "tensor": 2, "sequence": True}),
    "cp2+tp2+sp+ring": (4, {"context": 2, "tensor": 2, "sequence": True, "context_exchange": "ring"}),
    "cp2+pp2+ring": (4, {"context": 2, "pipeline": 2, "context_exchange": "ring"}),
}
"""Ranks and parallel section by name."""

GRID = [(layout, model, zero) for layout in LAYOUTS for model in ("llama", "dropout", "gpt") for zero in (0, 1)]

PAIRWISE = {
    ("dp2", "llama", 0), ("dp2", "dropout", 1), ("tp2", "gpt", 0), ("tp2+sp", "dropout", 1), ("pp2", "llama", 1),
    ("pp2+vp2", "dropout", 0), ("cp2", "dropout", 1), ("cp2", "llama", 0), ("tp2+pp2", "gpt", 1),
    ("tp2+sp+pp2+vp2", "dropout", 1), ("dp2+tp2", "llama", 1), ("dp2+tp2+sp", "gpt", 0), ("dp2+pp2", "gpt", 1),
    ("cp2+tp2", "gpt", 0), ("cp2+tp2+sp", "dropout", 1), ("cp4+ring", "gpt", 1),
    ("cp2+tp2+sp+ring", "dropout", 1), ("cp2+pp2+ring", "llama", 0),
}  # fmt: skip
"""Every layout, every model with both stages; the whole grid runs in `make test-all`."""


@pytest.mark.parametrize(("layout", "model", "zero_stage", "num_steps"), short_and_whole(PAIRWISE, GRID))
def test_fp32_equals_one_process(layout: str, model: str, zero_stage: int, num_steps: int) -> None:
    ranks, parallel = LAYOUTS[layout]
    config = parity_run(model)
    other = config.with_keys({"engine": {"name": "megatron", "zero_stage": zero_stage}, "parallel": parallel})
    assert verdict(config, other, ranks, num_steps).problems == []


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize(("layout", "zero_stage"), [("tp2+sp", 1), ("pp2", 0), ("dp2", 1)])
def test_low_precision_stays_within_its_bounds(precision: str, layout: str, zero_stage: int) -> None:
    ranks, parallel = LAYOUTS[layout]
    config = parity_run("llama", precision)
    other = config.with_keys({"engine": {"name": "megatron", "zero_stage": zero_stage}, "parallel": parallel})
    assert verdict(config, other, ranks, num_steps=5, levels=LOW_PRECISION).problems == []


SIZES_OF_FP8 = {"model.num_kv_heads": 4, "model.head_dim": 8, "model.ffn_hidden_size": 64}


@pytest.mark.parametrize(
    ("layout", "engine"),
    [
        ("dp2", {"name": "megatron", "zero_stage": 1}),
        ("dp2+pp2", {"name": "megatron"}),
        pytest.param("pp2+vp2", {"name": "megatron"}, marks=pytest.mark.whole_grid),
        ("dp2", {"name": "deepspeed", "zero_stage": 2}),
        pytest.param("dp2", {"name": "deepspeed"}, marks=pytest.mark.whole_grid),
        pytest.param("dp2", {"name": "torch"}, marks=pytest.mark.whole_grid),
    ],
)
def test_products_in_float8_are_the_same_in_every_layout(layout: str, engine: dict[str, Any]) -> None:
    """The first loss to the last bits: a layout that rounded other values, or none, would be seen there."""
    require_torchao()
    num_steps, (ranks, parallel) = 5, LAYOUTS[layout]
    config = parity_run("dropout", "fp8").with_keys(SIZES_OF_FP8)
    reference = assemble_trace(run_ranks(traced_rank, 1, config, num_steps, use_torchao))
    levels = replace(LOW_PRECISION, first_loss=1e-7)

    def found(other: RunConfig) -> list[str]:
        traces = run_ranks(traced_rank, ranks, other, num_steps, use_torchao, timeout_seconds=120)
        return compare(reference, assemble_trace(traces), levels).problems

    other = config.with_keys({"engine": engine, "parallel": parallel})
    assert found(other) == []
    if layout == "dp2+pp2":
        assert "loss" in found(other.with_keys({"train.precision": "bf16"}))[0]


@pytest.mark.parametrize("recompute", ["selective", pytest.param("full", marks=pytest.mark.whole_grid)])
def test_recompute_changes_nothing(recompute: str) -> None:
    ranks, parallel = LAYOUTS["tp2+sp"]
    config = parity_run("dropout", recompute=recompute)
    other = config.with_keys({"engine": {"name": "megatron", "zero_stage": 1}, "parallel": parallel})
    assert verdict(parity_run("dropout"), other, ranks, num_steps=5).problems == []


@pytest.mark.whole_grid
def test_compiled_layers_change_nothing() -> None:
    config = parity_run("dropout")
    compiled = config.with_keys({"train.compile": True})
    other = compiled.with_keys({"engine": {"name": "megatron", "zero_stage": 1}, "parallel": {}})
    assert verdict(config, other, 2, num_steps=3).problems == []


@pytest.mark.parametrize("layout", ["cp2", "tp2+sp"])
def test_packed_documents_are_kept_apart(layout: str) -> None:
    ranks, parallel = LAYOUTS[layout]
    config = parity_run("llama")
    packed = config.with_keys({"data.reset_attention": True})
    other = packed.with_keys({"engine": {"name": "megatron", "zero_stage": 1}, "parallel": parallel})
    assert verdict(packed, other, ranks, num_steps=3).problems == []


def test_fewer_key_heads_than_context_ranks() -> None:
    config = parity_run("llama")
    one = config.with_keys({"model.num_kv_heads": 1})
    other = one.with_keys({"engine": {"name": "megatron", "zero_stage": 1}, "parallel": {"context": 4}})
    assert verdict(one, other, 4, num_steps=3).problems == []


def test_uneven_stages_and_overlapped_reductions() -> None:
    config = parity_run("llama")
    other = config.with_keys(
        {"engine": {"name": "megatron", "zero_stage": 1}, "parallel": {"pipeline": 2, "pipeline_split": [1, 3]}}
    )
    assert verdict(config, other, 2, num_steps=3).problems == []
    overlapped = config.with_keys(
        {"engine": {"name": "megatron", "zero_stage": 1}, "parallel": {"overlap_grad_reduce": True}}
    )
    assert verdict(config, overlapped, 2, num_steps=3).problems == []


@pytest.mark.parametrize("layout", ["dp2", pytest.param("tp2+sp", marks=pytest.mark.whole_grid), "pp2"])
def test_fp16_recovers_from_an_overflow(layout: str) -> None:
    """All ranks skip the same steps until the scale is low enough. Where the model is whole, it is one process's steps.

    A part of a sum may stay below fp16's largest number at a scale where the whole overflows: a tensor rank's part, or
    on two stages the head's and the embedding's parts of a tied weight's gradient.
    """
    ranks, parallel = LAYOUTS[layout]
    config = parity_run("llama", "fp16")
    config = config.with_keys({"optim.loss_scale.initial": 2.0**30})
    other = config.with_keys({"engine": {"name": "megatron", "zero_stage": 1}, "parallel": parallel})
    together = run_ranks(traced_rank, ranks, other, 20, None, timeout_seconds=120)
    skipped = [step.skipped for step in together[0].steps]
    assert skipped[0]
    assert not skipped[-1]
    assert all([step.skipped for step in rank.steps] == skipped for rank in together)
    if not parallel:
        alone = reference(config, 20)
        assert [step.skipped for step in alone.steps] == skipped
        assert worst_tensor(alone.final, assemble_trace(together).final, LOW_PRECISION.floor)[1] < LOW_PRECISION.weight
