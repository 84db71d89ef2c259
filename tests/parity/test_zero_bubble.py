"""The zero-bubble schedule: the bits of 1F1B, the numbers of one process, and weight gradients that are apart."""

from collections.abc import Callable
from dataclasses import asdict
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from llmtrain.checks.parity.batches import probe_batches
from llmtrain.checks.parity.compare import LOW_PRECISION, Pieces, RankTrace
from llmtrain.config.schema import RunConfig
from llmtrain.parallel.layout import plan_layout
from llmtrain.parallel.pipeline_schedule import Action, Compute, plan_zero_bubble
from tests.parity.cases import case_name, parity_run, traced_rank, verdict
from tests.parity.test_freeze import FROZEN
from tests.parity.test_gpu_choices import as_on_a_gpu
from tests.support.ranks import run_ranks

Mutation = Callable[[], None]

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "pp2": (2, {"pipeline": 2}),
    "pp4": (4, {"pipeline": 4}),
    "tp2+pp2": (4, {"tensor": 2, "pipeline": 2}),
    "tp2+sp+pp2": (4, {"tensor": 2, "sequence": True, "pipeline": 2}),
    "cp2+pp2": (4, {"context": 2, "pipeline": 2}),
    "dp2+pp2": (4, {"pipeline": 2}),
    "dp2+pp2+overlap": (4, {"pipeline": 2, "overlap_grad_reduce": True}),
    "dp2+pp2+ep2": (4, {"pipeline": 2, "expert": 2}),
    "pp2+split4.0": (2, {"pipeline": 2, "pipeline_split": (4, 0)}),
}
"""Ranks and parallel section by name."""

WHOLE_MODELS = ("llama", "dropout", "gpt", "bert", "t5", "switch_t5", "top_2", "shared")
SHORT = [
    ("dropout", "tp2+sp+pp2", 1, "bf16"), ("gpt", "tp2+pp2", 0, "fp32"), ("t5", "pp4", 0, "bf16"),
    ("top_2", "dp2+pp2+ep2", 1, "fp32"), ("llama", "dp2+pp2+overlap", 1, "fp32"),
]  # fmt: skip
"""Tied and untied, with biases and without, experts, an encoder-decoder."""

GRID = [
    (model, layout, (m + n // 2) % 2, ("fp32", "bf16")[(m + n) % 2])
    for m, model in enumerate(WHOLE_MODELS)
    for n, layout in enumerate(LAYOUTS)
    if "ep2" not in layout or model in ("switch_t5", "top_2", "shared")
]
"""Every model in every layout that it can have; precisions and stages by turns."""


def laid_out(config: RunConfig, layout: str, zero_stage: int, schedule: str | None = "zero_bubble") -> RunConfig:
    parallel = {**LAYOUTS[layout][1], "pipeline_schedule": schedule}
    return config.with_keys({"engine": {"name": "megatron", "zero_stage": zero_stage}, "parallel": parallel})


def more_micro_batches(config: RunConfig) -> RunConfig:
    """More than stages, so that every stage has all of the schedule's phases."""
    return config.with_keys({"train.global_batch_size": 16})


@lru_cache
def traces(config: RunConfig, ranks: int, num_steps: int, mutation: Mutation | None = None) -> list[RankTrace]:
    return run_ranks(traced_rank, ranks, config, num_steps, mutation, timeout_seconds=120)


def differences(one: list[RankTrace], other: list[RankTrace]) -> list[str]:
    """What is not the same bits on every rank, the first cause first."""
    found: list[str] = []
    for rank, (a, b) in enumerate(zip(one, other, strict=True)):
        for number, (x, y) in enumerate(zip(a.gradients, b.gradients, strict=True), start=1):
            found += [f"rank {rank}: gradient of {name} in step {number}" for name in unlike(x, y)]
        for number, (x, y) in enumerate(zip(a.steps, b.steps, strict=True), start=1):
            if repr(asdict(x)) != repr(asdict(y)):  # as text: a skipped step's norm may be no number
                found.append(f"rank {rank}: step {number}: {x}, {y}")
        found += [f"rank {rank}: weight {name}" for name in unlike(a.final, b.final)]
        found += [f"rank {rank}: evaluation"] if a.evaluation != b.evaluation else []
    return found


def unlike(one: Pieces, other: Pieces) -> list[str]:
    pairs = zip(one, other, strict=True)
    return [a[0] for a, b in pairs if a[:3] != b[:3] or not np.array_equal(a[3], b[3], equal_nan=True)]


def against_1f1b(
    config: RunConfig,
    layout: str,
    zero_stage: int,
    num_steps: int,
    mutation: Mutation | None = None,
    both: Mutation | None = None,
) -> list[str]:
    """`mutation` is for the zero-bubble schedule alone, unless it is for both."""
    ranks, mutation = LAYOUTS[layout][0], mutation or both
    expected = traces(laid_out(config, layout, zero_stage, None), ranks, num_steps, both)
    return differences(expected, traces(laid_out(config, layout, zero_stage), ranks, num_steps, mutation))


@pytest.mark.parametrize(
    ("model", "layout", "zero_stage", "precision", "num_steps"),
    [
        *(pytest.param(*case, 2, id=case_name(case)) for case in SHORT),
        *(pytest.param(*case, 5, id=f"{case_name(case)}-5", marks=pytest.mark.whole_grid) for case in GRID),
    ],
)
def test_it_computes_the_bits_of_1f1b(model: str, layout: str, zero_stage: int, precision: str, num_steps: int) -> None:
    config = more_micro_batches(parity_run(model, precision))
    assert against_1f1b(config, layout, zero_stage, num_steps) == []


@pytest.mark.parametrize("micro_batches", [2, *(pytest.param(m, marks=pytest.mark.whole_grid) for m in (1, 3))])
def test_fewer_micro_batches_than_stages(micro_batches: int) -> None:
    config = parity_run("llama").with_keys({"train.global_batch_size": 2 * micro_batches})
    assert against_1f1b(config, "pp4", 0, 2) == []


@pytest.mark.parametrize("recompute", ["selective", pytest.param("full", marks=pytest.mark.whole_grid)])
def test_with_recomputation_too(recompute: str) -> None:
    config = more_micro_batches(parity_run("llama", recompute=recompute))
    assert against_1f1b(config, "pp2", 0, 2) == []


def keep_less() -> None:
    """As on a GPU: the inputs of blocks are gathered again, and products of activations computed again."""
    from llmtrain.models import pointwise
    from llmtrain.parallel import tensor

    tensor.regathers = pointwise.keeps_less = lambda x: True


def test_what_a_gpu_makes_again_in_the_backward_pass_changes_nothing() -> None:
    config = more_micro_batches(parity_run("llama"))
    assert against_1f1b(config, "tp2+sp+pp2", 0, 2, both=keep_less) == []


@pytest.mark.parametrize(("model", "zero_stage"), [("gpt", 0), pytest.param("llama", 1, marks=pytest.mark.whole_grid)])
def test_queries_keys_and_values_in_one_product_as_on_a_gpu(model: str, zero_stage: int) -> None:
    config = more_micro_batches(parity_run(model))
    assert against_1f1b(config, "pp2", zero_stage, 2, both=as_on_a_gpu) == []
    other = traces(laid_out(config, "pp2", zero_stage), 2, 2)
    joint = traces(laid_out(config, "pp2", zero_stage), 2, 2, as_on_a_gpu)
    assert differences(joint, other) != [], "another product has other last bits"


@pytest.mark.parametrize("model", ["gpt", *(pytest.param(m, marks=pytest.mark.whole_grid) for m in ("llama", "top_2"))])
def test_frozen_parameters_are_left_out(model: str) -> None:
    config = more_micro_batches(parity_run(model)).with_keys({"optim.freeze": FROZEN[model]})
    assert against_1f1b(config, "pp2", 1, 2) == []


def test_steps_that_fp16_skips_are_the_same() -> None:
    config = more_micro_batches(parity_run("llama", "fp16")).with_keys({"optim.loss_scale.initial": 2.0**23})
    assert against_1f1b(config, "pp2", 1, 3) == []
    ranks = traces(laid_out(config, "pp2", 1), 2, 3)
    assert [step.skipped for step in ranks[0].steps] == [True, False, False]


def let_go_of_outputs() -> None:
    """As on a GPU: a stage lets go of what it has sent."""
    from llmtrain.engines.megatron_engine import engine

    original = engine.transformer_config

    def config(*arguments: Any) -> Any:
        built = original(*arguments)
        built.deallocate_pipeline_outputs = True
        return built

    engine.transformer_config = config


@pytest.mark.parametrize("micro_batches", [1, pytest.param(8, marks=pytest.mark.whole_grid)])
def test_outputs_that_are_let_go_as_on_a_gpu_change_nothing(micro_batches: int) -> None:
    config = parity_run("llama").with_keys({"train.global_batch_size": 2 * micro_batches})
    assert against_1f1b(config, "pp2", 0, 2, let_go_of_outputs) == []


@pytest.mark.parametrize(
    ("model", "layout", "zero_stage"),
    [
        ("dropout", "pp2", 1),
        *(
            pytest.param(*case, marks=pytest.mark.whole_grid)
            for case in (("t5", "pp4", 0), ("top_2", "dp2+pp2+ep2", 1), ("gpt", "cp2+pp2", 1), ("bert", "dp2+pp2", 0))
        ),
    ],
)
def test_fp32_equals_one_process(model: str, layout: str, zero_stage: int) -> None:
    config = parity_run(model)
    assert verdict(config, laid_out(config, layout, zero_stage), LAYOUTS[layout][0]).problems == []


@pytest.mark.whole_grid
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_stays_within_its_bounds(precision: str) -> None:
    config = parity_run("llama", precision)
    assert verdict(config, laid_out(config, "pp2", 0), 2, num_steps=5, levels=LOW_PRECISION).problems == []


@pytest.mark.whole_grid
def test_compiled_layers_change_nothing() -> None:
    """Graphs end at the linears, whose backward pass is in two parts; so they are not 1F1B's, nor are their bits."""
    config = parity_run("dropout")
    compiled = config.with_keys({"train.compile": True})
    assert verdict(config, laid_out(compiled, "pp2", 1), 2, num_steps=3).problems == []


def drop_one_weight_gradient() -> None:
    from llmtrain.models.weight_gradients import WeightGradients

    original = WeightGradients.close

    def close(self: Any) -> None:
        self._open.popleft()
        original(self)

    WeightGradients.close = close


def newest_first() -> None:
    from llmtrain.models.weight_gradients import WeightGradients

    original = WeightGradients.compute_oldest

    def compute_newest(self: Any) -> None:
        self._closed.rotate(1)
        original(self)

    WeightGradients.compute_oldest = compute_newest


def reduce_before_the_weights() -> None:
    """A weight's gradient counts as complete in the backward pass, and is added to the buffer later."""
    from megatron.core.distributed import DistributedDataParallel

    from llmtrain.models.weight_gradients import WeightGradients

    build, add, built = DistributedDataParallel.__init__, WeightGradients.add, []

    def recorded(self: Any, *arguments: Any, **keys: Any) -> None:
        build(self, *arguments, **keys)
        built.append(self)

    def counted(self: Any, weights: Any, compute: Any) -> None:
        for weight in weights:
            built[0].param_to_bucket_group[weight].register_grad_ready(weight)
        add(self, weights, compute)

    @torch.no_grad()
    def late(self: Any) -> None:
        for weights, compute in self._closed.popleft():
            for weight, gradient in zip(weights, compute(), strict=True):
                weight.main_grad.add_(gradient)

    DistributedDataParallel.__init__ = recorded
    WeightGradients.add, WeightGradients.compute_oldest = counted, late


@pytest.mark.parametrize(
    ("mutation", "layout", "named"),
    [
        (drop_one_weight_gradient, "pp2", "gradient of decoder.layers."),
        (newest_first, "pp2", "gradient of decoder.layers."),
        (reduce_before_the_weights, "dp2+pp2+overlap", "in step 2"),
    ],
)
def test_broken_code_is_caught(mutation: Mutation, layout: str, named: str) -> None:
    config = more_micro_batches(parity_run("llama"))
    found = against_1f1b(config, layout, 1, 2, mutation)
    assert found and named in found[0], found[:3]


class Products(TorchDispatchMode):
    """Counts products of matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keys: Any = None) -> Any:
        self.count += function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
        return function(*arguments, **(keys or {}))


def executed_rank(rank: int, world_size: int, config: RunConfig) -> tuple[list[Action], dict[Action, int], int]:
    """What a rank did in its second step, the products of each computation, and how many linears it has."""
    from llmtrain.engines.megatron_engine.engine import MegatronEngine
    from llmtrain.engines.megatron_engine.zero_bubble import StageStep

    original, done, products = StageStep.do, list[Action](), dict[Action, int]()

    def recorded(self: Any, action: Action) -> None:
        with Products() as mode:
            original(self, action)
        done.append(action)
        if isinstance(action, Compute):
            products[action] = mode.count

    engine = MegatronEngine(config, torch.device("cpu"))
    layout = plan_layout(config.parallel, world_size)
    for step in (1, 2):
        done.clear()
        StageStep.do = recorded
        engine.train_step(step, probe_batches(config, step, layout.coordinates(rank).data, layout.data), 1e-3)
    linears = sum(name.count(".layers.") and module.weight.dim() == 2 for name, module in weighted(engine))
    return done, products, linears


def weighted(engine: Any) -> list[tuple[str, Any]]:
    modules = engine.chunks[0].named_modules()
    return [(name, module) for name, module in modules if getattr(module, "weight", None) is not None]


@pytest.mark.parametrize("layout", ["pp2", pytest.param("tp2+pp2", marks=pytest.mark.whole_grid)])
def test_what_was_planned_is_done_and_weight_gradients_are_apart(layout: str) -> None:
    """Per linear F, B and W are one product each; on the last stage the head adds its three to F."""
    ranks, parallel = LAYOUTS[layout]
    config = laid_out(more_micro_batches(parity_run("llama")), layout, 0)
    for rank, (done, products, linears) in enumerate(run_ranks(executed_rank, ranks, config)):
        stage = plan_layout(config.parallel, ranks).coordinates(rank).pipeline
        assert done == plan_zero_bubble(stage, parallel["pipeline"], 8)
        assert linears == 2 * 7, "two layers of four linears and three"
        assert {products[each] for each in products if each.work == "forward"} == {linears + 3 * (stage == 1)}
        assert {products[each] for each in products if each.work == "input_gradient"} == {linears}
        assert {products[each] for each in products if each.work == "weight_gradient"} == {linears}
