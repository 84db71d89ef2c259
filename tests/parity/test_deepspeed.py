"""The deepspeed engine, all ZeRO stages, in every layout against one process."""

from collections.abc import Callable
from typing import Any

import pytest

from llmtrain.checks.parity.compare import LOW_PRECISION, Verdict
from llmtrain.config.schema import RunConfig
from tests.parity.cases import parity_run, short_and_whole, verdict

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "dp2": (2, {}),
    "dp4": (4, {}),
    "tp2": (2, {"tensor": 2}),
    "tp2+sp": (2, {"tensor": 2, "sequence": True}),
    "cp2": (2, {"context": 2}),
    "cp2+ring": (2, {"context": 2, "context_exchange": "ring"}),
    "dp2+tp2": (4, {"tensor": 2}),
    "dp2+tp2+sp": (4, {"tensor": 2, "sequence": True}),
    "cp2+tp2+sp": (4, {"context": 2, "tensor": 2, "sequence": True}),
}
"""Ranks and parallel section by name."""

GRID = [(layout, model, zero) for layout in LAYOUTS for model in ("llama", "dropout", "gpt") for zero in (0, 1, 2, 3)]

PAIRWISE = {
    ("dp2", "llama", 0), ("dp2", "gpt", 2), ("dp4", "llama", 3), ("dp4", "dropout", 1), ("tp2", "llama", 1),
    ("tp2+sp", "gpt", 0), ("cp2", "dropout", 2), ("cp2", "gpt", 3), ("dp2+tp2", "llama", 2),
    ("dp2+tp2+sp", "dropout", 3), ("cp2+tp2+sp", "gpt", 1), ("cp2+ring", "dropout", 3),
}  # fmt: skip
"""Every layout and every model, each with several stages; the whole grid runs in `make test-all`."""


def whole(*case: Any) -> Any:
    """A case that runs in `make test-all` only."""
    return pytest.param(*case, marks=pytest.mark.whole_grid)


def small_pieces() -> None:
    """Nothing is whole on every rank in stage 3, and gradients are reduced in many buckets."""
    from llmtrain.engines.deepspeed_engine import setup

    setup.WHOLE_ELEMENTS = 0
    setup.BUCKET_ELEMENTS = 2000


@pytest.mark.parametrize(("layout", "model", "zero_stage", "num_steps"), short_and_whole(PAIRWISE, GRID))
def test_fp32_equals_one_process(layout: str, model: str, zero_stage: int, num_steps: int) -> None:
    ranks, parallel = LAYOUTS[layout]
    config = parity_run(model)
    other = config.with_keys({"engine": {"name": "deepspeed", "zero_stage": zero_stage}, "parallel": parallel})
    assert verdict(config, other, ranks, num_steps).problems == []


@pytest.mark.parametrize(
    ("layout", "zero_stage"),
    [("dp2", 1), ("dp2", 2), ("tp2+sp", 3), *(whole("dp2", 3), whole("tp2+sp", 1), whole("tp2+sp", 2))],
)
def test_small_pieces_and_overlap_change_nothing(layout: str, zero_stage: int) -> None:
    ranks, parallel = LAYOUTS[layout]
    config = parity_run("gpt" if layout == "tp2+sp" else "llama")
    overlapped = {**parallel, "overlap_grad_reduce": True}
    other = config.with_keys({"engine": {"name": "deepspeed", "zero_stage": zero_stage}, "parallel": overlapped})
    assert verdict(config, other, ranks, num_steps=5, mutation=small_pieces).problems == []


@pytest.mark.parametrize("zero_stage", [whole(0), whole(1), 2, 3])
def test_padding_of_uneven_parts_changes_nothing(zero_stage: int) -> None:
    """Nothing in the model divides by three."""
    config = parity_run("gpt")
    config = config.with_keys({"train.global_batch_size": 12})
    other = config.with_keys({"engine": {"name": "deepspeed", "zero_stage": zero_stage}, "parallel": {}})
    assert verdict(config, other, 3, num_steps=5, mutation=small_pieces).problems == []


@pytest.mark.parametrize(
    ("layout", "zero_stage", "precision"),
    [
        ("dp2", 2, "fp32"), ("dp2", 3, "fp32"), ("dp2", 2, "bf16"), whole("dp2", 1, "fp32"), whole("dp2", 1, "bf16"),
        whole("dp2", 3, "bf16"), whole("dp2+tp2+sp", 2, "fp32"), whole("dp2+tp2+sp", 3, "fp32"),
        whole("dp2+tp2+sp", 2, "bf16"), whole("dp2+tp2+sp", 3, "bf16"),
    ],
)  # fmt: skip
def test_offload_to_the_cpu_changes_nothing(layout: str, zero_stage: int, precision: str) -> None:
    ranks, parallel = LAYOUTS[layout]
    config = parity_run("dropout", precision)
    other = config.with_keys(
        {"engine": {"name": "deepspeed", "zero_stage": zero_stage, "offload": "cpu"}, "parallel": parallel}
    )
    result = verdict(config, other, ranks) if precision == "fp32" else low_precision_verdict(config, other, ranks)
    assert result.problems == []


@pytest.mark.parametrize(
    ("layout", "zero_stage"),
    [("dp2", 0), ("dp2", 2), ("dp2", 3), whole("dp2", 1), *(whole("tp2+sp", stage) for stage in range(4))],
)
def test_bf16_stays_within_its_bounds(layout: str, zero_stage: int) -> None:
    ranks, parallel = LAYOUTS[layout]
    config = parity_run("llama", "bf16")
    other = config.with_keys({"engine": {"name": "deepspeed", "zero_stage": zero_stage}, "parallel": parallel})
    result = low_precision_verdict(config, other, ranks)
    assert result.problems == []
    if layout == "dp2":
        # Each micro-batch's gradient is that of one process to the last bit; sums in bf16 would differ by 1e-3.
        assert result.gradient < 1e-6


def low_precision_verdict(config: RunConfig, other: RunConfig, ranks: int) -> Verdict:
    return verdict(config, other, ranks, num_steps=5, levels=LOW_PRECISION)


@pytest.mark.whole_grid
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recompute_under_stage_3_changes_nothing(recompute: str) -> None:
    ranks, parallel = LAYOUTS["tp2+sp"]
    config = parity_run("dropout", recompute=recompute)
    other = config.with_keys({"engine": {"name": "deepspeed", "zero_stage": 3}, "parallel": parallel})
    assert verdict(parity_run("dropout"), other, ranks, num_steps=5, mutation=small_pieces).problems == []


def drop_data_reduction_of_stage_0() -> None:
    from llmtrain.engines.deepspeed_engine.zero0 import Replicated

    Replicated.reduce = lambda self: None


def drop_data_reduction_of_stage_2() -> None:
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    broken: Any = DeepSpeedZeroOptimizer
    broken.average_tensor = lambda *_: None


def forget_that_stage_3_averages() -> None:
    from llmtrain.engines.deepspeed_engine.zero3 import PartitionedWeights

    broken: Any = PartitionedWeights
    broken.averaged_over = property(lambda self: 1, lambda self, value: None)


def drop_sequence_reduction() -> None:
    from llmtrain.engines.deepspeed_engine import engine

    engine.sum_over_ranks = lambda tensors, group: None


def decay_everything() -> None:
    from llmtrain.engines.deepspeed_engine import engine

    engine.parameter_groups = lambda named, optim: [
        {"params": list(named.values()), "weight_decay": optim.weight_decay}
    ]


def mean_of_means() -> None:
    from llmtrain.engines.deepspeed_engine.engine import DeepSpeedEngine

    DeepSpeedEngine.sum_over_data = lambda self, count: count


MUTATIONS: list[tuple[Callable[[], None], dict[str, Any], int, str]] = [
    (drop_data_reduction_of_stage_0, {}, 0, "gradient"),
    (drop_data_reduction_of_stage_2, {}, 2, "gradient"),
    (forget_that_stage_3_averages, {}, 3, "gradient"),
    (drop_sequence_reduction, {"tensor": 2, "sequence": True}, 3, "norm.weight"),
    (decay_everything, {}, 3, "norm.weight after the last step"),
    (mean_of_means, {}, 1, "loss of step 1"),
]


@pytest.mark.parametrize(
    ("mutation", "parallel", "zero_stage", "named"), MUTATIONS, ids=[mutation.__name__ for mutation, *_ in MUTATIONS]
)
def test_broken_code_is_caught(
    mutation: Callable[[], None], parallel: dict[str, Any], zero_stage: int, named: str
) -> None:
    config = parity_run("llama")
    other = config.with_keys({"engine": {"name": "deepspeed", "zero_stage": zero_stage}, "parallel": parallel})
    problems = verdict(config, other, 2, num_steps=5, mutation=mutation).problems
    assert any(named in problem for problem in problems), problems
