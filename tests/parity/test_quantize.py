"""Training for whole numbers in every engine and layout: the numbers of one process, and in one process those of a
plain model that has the rounded weights."""

from collections.abc import Callable, Iterable
from itertools import cycle
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from llmtrain.checks.parity.batches import probe_batches
from llmtrain.checks.parity.compare import LOW_PRECISION, Pieces, pieces
from llmtrain.config.parameters import declare_parameters, quantized_linears
from llmtrain.config.schema import RunConfig
from llmtrain.engines.torch_engine import TorchEngine
from llmtrain.models import rounded_products
from llmtrain.models.init import InitialWeights
from llmtrain.models.rounded_inputs import rounded_tokens
from llmtrain.models.rounded_products import MatrixRounding, RoundedProduct
from llmtrain.parallel.layout import plan_layout
from llmtrain.train.setup import engine_class
from llmtrain.values.fragment import Box, Fragment
from llmtrain.values.precision import DTYPES
from llmtrain.values.quantization import NumberGrid, round_to_nearest
from tests.parity.cases import parity_run, short_and_whole, verdict
from tests.parity.test_deepspeed import small_pieces
from tests.parity.test_freeze import LAYOUTS, PLACES, laid_out
from tests.support.ranks import run_ranks

KINDS: dict[str, dict[str, Any]] = {
    "w8": {"scheme": "w8a16"},
    "w4": {"scheme": "w4a16", "group": 8},
    "some": {"scheme": "w4a16", "group": 0, "keep": ["attention.q", "mlp.down", "decoder.layers.1.*"]},
    "inputs": {"scheme": "w8a8"},
}
EXACT = ("w8", "w4", "some")
"""Inputs are rounded to 8 bits where sums in another order have other last bits: the numbers of two layouts are as near
as those of a low precision."""

GRID = [(kind, model, *place) for (kind, model), place in zip(
    cycle((kind, model) for model in ("llama", "gpt", "dropout") for kind in EXACT), PLACES, strict=False)
] + [
    (kind, model, *place) for kind, model, place in (
        ("w8", "top_2", ("megatron:dp2+ep2", 1)), ("w4", "switch_t5", ("deepspeed:dp2+ep2", 2)),
        ("w4", "shared", ("megatron:tp2+sp", 0)), ("w8", "bert", ("megatron:pp2", 0)),
        ("w4", "bert", ("deepspeed:dp2", 3)),
        ("w8", "t5", ("megatron:tp2+sp", 1)), ("w4", "t5", ("megatron:pp2", 1)), ("w8", "top_2", ("megatron:tp2", 1)),
        ("w4", "t5", ("deepspeed:dp2", 2)),
    )
]  # fmt: skip
PAIRWISE = [
    *(("w8", "llama", "torch:dp2", 0), ("some", "gpt", "megatron:tp2", 0), ("w4", "llama", "megatron:pp2", 0)),
    *(("w4", "dropout", "deepspeed:tp2+sp", 1), ("w8", "gpt", "deepspeed:dp2", 3)),
    ("w8", "top_2", "megatron:dp2+ep2", 1),
]


STEADY = {"optim.eps": 1.0}
"""Updates that are as gradients are. Adam's usual ones are the signs of small gradients: sums in another order make
another sign, and that is enough to bring a weight over the edge between two numbers, now and then."""


def quantize_run(kind: str, model: str = "llama", precision: str = "fp32", **keys: Any) -> RunConfig:
    return parity_run(model, precision).with_keys({"quantize": KINDS[kind], **STEADY, **keys})


@pytest.mark.parametrize(("kind", "model", "layout", "stage", "num_steps"), short_and_whole(PAIRWISE, GRID))
def test_fp32_equals_one_process(kind: str, model: str, layout: str, stage: int, num_steps: int) -> None:
    assert layout in LAYOUTS
    config = quantize_run(kind, model)
    assert verdict(config, *laid_out(config, layout, stage), num_steps=num_steps).problems == []


@pytest.mark.parametrize(
    ("kind", "precision", "layout", "stage", "recompute"),
    [
        ("w4", "bf16", "megatron:tp2+sp", 1, "none"), ("inputs", "bf16", "deepspeed:tp2", 1, "selective"),
        pytest.param("w8", "bf16", "deepspeed:dp2", 3, "full", marks=pytest.mark.whole_grid),
        pytest.param("inputs", "fp32", "megatron:tp2+sp", 0, "none", marks=pytest.mark.whole_grid),
    ],
)  # fmt: skip
def test_low_precision_stays_within_its_bounds(
    kind: str, precision: str, layout: str, stage: int, recompute: str
) -> None:
    config = quantize_run(kind, "llama", precision, **{"train.recompute": recompute})
    assert verdict(config, *laid_out(config, layout, stage), levels=LOW_PRECISION).problems == []


@pytest.mark.parametrize("recompute", [pytest.param("selective", marks=pytest.mark.whole_grid), "full"])
def test_what_is_computed_again_is_the_same(recompute: str) -> None:
    config = quantize_run("w8", "gpt")
    again, ranks = laid_out(config.with_keys({"train.recompute": recompute}), "megatron:tp2", 0)
    assert verdict(config, again, ranks).problems == []


def rounded_on_rank(rank: int, size: int, config: RunConfig, mutation: Callable[[], None] | None) -> Pieces:
    """The rounded weights that one rank multiplies by, as boxes of the global tensors."""
    if mutation:
        mutation()
    if config.engine.name == "deepspeed":
        small_pieces()
    engine: Any = engine_class(config.engine.name)(config, torch.device("cpu"))
    seen: dict[int, Tensor] = {}
    round_weight = MatrixRounding.weight

    def noted(self: MatrixRounding, weight: Tensor, scale_OG: Tensor) -> Tensor:
        seen[id(weight)] = value = round_weight(self, weight, scale_OG)
        return value

    MatrixRounding.weight = noted
    layout = plan_layout(config.parallel, size)
    engine.eval_step(probe_batches(config, 1, layout.coordinates(rank).data, layout.data))
    if config.engine.name == "torch":
        parts = [(each, name, each.shape, Box.whole(each.shape)) for name, each in engine.parameters.items()]
    else:
        parts = [(each, place.name, place.global_shape, place.box) for each, place in engine.placements.items()]
    return pieces(
        Fragment(name, "weight", shape, box, seen[id(each)]) for each, name, shape, box in parts if id(each) in seen
    )


def wrongly_rounded(kind: str, model: str, precision: str, layout: str, stage: int, mutation: Any = None) -> set[str]:
    """Weights that some rank rounds in another way than `llmtrain compress` rounds the whole matrix; all must be
    there, and no others."""
    config = quantize_run(kind, model, precision)
    assert config.quantize is not None
    initial, declared = InitialWeights(config.model, config.seed), declare_parameters(config.model)
    dtype, numbers = DTYPES[precision], config.quantize.numbers
    named = [weight.name for _, weight in quantized_linears(config.model, config.quantize.keep)]
    expected = {}
    for name in named:
        shape = declared[name].shape
        whole = initial.read(name, "master", Box.whole(shape)).to(dtype)
        found = round_to_nearest(whole.flatten(0, -2), NumberGrid(numbers.bits, numbers.group), dtype)
        expected[name] = found.dequantized().to(dtype).float().view(shape)
    wrong, seen = set[str](), set[str]()
    for parts in run_ranks(rounded_on_rank, *reversed(laid_out(config, layout, stage)), mutation, timeout_seconds=120):
        for name, shape, box, data in parts:
            seen.add(name)
            if not torch.equal(expected[name][box.slices_in(Box.whole(shape))], torch.from_numpy(data)):
                wrong.add(name)
    assert seen == set(named)
    return wrong


@pytest.mark.parametrize(
    ("kind", "model", "precision", "layout", "stage"),
    [
        ("w8", "top_2", "bf16", "megatron:dp2+ep2", 0), ("w4", "gpt", "bf16", "deepspeed:tp2+sp", 2),
        ("some", "t5", "fp32", "megatron:tp2+sp", 0),
        pytest.param("w8", "llama", "fp32", "megatron:tp2", 1, marks=pytest.mark.whole_grid),
        pytest.param("w8", "gpt", "fp32", "deepspeed:dp2", 3, marks=pytest.mark.whole_grid),
        pytest.param("w8", "shared", "fp32", "deepspeed:tp2", 1, marks=pytest.mark.whole_grid),
    ],
)  # fmt: skip
def test_every_rank_rounds_as_the_whole_matrix_is_rounded(
    kind: str, model: str, precision: str, layout: str, stage: int
) -> None:
    assert wrongly_rounded(kind, model, precision, layout, stage) == set()


class Rounded:
    """The initial weights, rounded."""

    def __init__(self, config: RunConfig) -> None:
        assert config.quantize is not None
        self.initial, self.grid = InitialWeights(config.model, config.seed), NumberGrid(*shown(config))
        self.names = {weight.name for _, weight in quantized_linears(config.model, config.quantize.keep)}

    def global_shape(self, name: str, kind: str) -> tuple[int, ...] | None:
        return self.initial.global_shape(name, kind)

    def read(self, name: str, kind: str, box: Box) -> Tensor:
        found = self.initial.read(name, kind, box)
        if name not in self.names:
            return found
        assert box == Box.whole(box.shape)
        return round_to_nearest(found.flatten(0, -2), self.grid).dequantized().view_as(found)


def shown(config: RunConfig) -> tuple[int, int | None]:
    assert config.quantize is not None
    return config.quantize.numbers.bits, config.quantize.numbers.group


def gradients(engine: TorchEngine, config: RunConfig) -> tuple[float, dict[str, Tensor]]:
    found: dict[str, Tensor] = {}

    def keep(fragments: Iterable[Fragment]) -> None:
        found.update({fragment.name: fragment.tensor.clone() for fragment in fragments})

    engine.inspect_gradients = keep
    return engine.train_step(1, probe_batches(config, 1, 0, 1), 1e-3).loss, found


def round_what_goes_in(linear: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Straight through, as others write it."""
    return inputs[0] + (rounded_tokens(inputs[0]) - inputs[0]).detach(), *inputs[1:]


@pytest.mark.parametrize(("kind", "model"), [("w8", "llama"), ("w4", "top_2"), ("inputs", "gpt"), ("some", "t5")])
def test_loss_and_gradients_are_those_of_rounded_weights_and_the_weights_go_on(kind: str, model: str) -> None:
    keys = {"optim.grad_clip": 0.0, "optim.weight_decay": 0.0}
    config = quantize_run(kind, model, **keys)
    plain = config.with_keys({"quantize": None})
    engine, other = TorchEngine(config, torch.device("cpu")), TorchEngine(plain, torch.device("cpu"))
    other.load_weights(Rounded(config))
    if kind == "inputs":
        for name, _ in quantized_linears(config.model, ()):
            other.model.get_submodule(name).register_forward_pre_hook(round_what_goes_in)
    before = {name: weight.detach().clone() for name, weight in engine.parameters.items()}
    (loss, found), (expected_loss, expected) = gradients(engine, config), gradients(other, plain)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    rounded = Rounded(config)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-7, msg=name)
        # The step is taken from the weight itself, not from what it is rounded to.
        start = rounded.read(name, "master", Box.whole(before[name].shape))
        moved, other_moved = engine.parameters[name] - before[name], other.parameters[name] - start
        torch.testing.assert_close(moved, other_moved, rtol=1e-2, atol=1e-6, msg=name)


def test_an_evaluation_rounds_too() -> None:
    config = quantize_run("w4")
    plain = TorchEngine(config.with_keys({"quantize": None}), torch.device("cpu"))
    batches, losses = probe_batches(config, 1, 0, 1), [plain.eval_step(probe_batches(config, 1, 0, 1)).loss_sum]
    plain.load_weights(Rounded(config))
    losses += [engine.eval_step(batches).loss_sum for engine in (plain, TorchEngine(config, torch.device("cpu")))]
    assert losses[1] == pytest.approx(losses[2], rel=1e-6) and losses[0] != pytest.approx(losses[1], rel=1e-6)


def scales_are_of_each_shard() -> None:
    MatrixRounding._largest_of_ranks = lambda self, largest: largest


def rounding_has_no_gradient() -> None:
    """Not straight through: the gradient of a staircase is zero."""
    backward = RoundedProduct.backward

    def spoiled(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        d_x, d_weight, *others = backward(ctx, *grads)
        return d_x, None if d_weight is None else torch.zeros_like(d_weight), *others

    RoundedProduct.backward = staticmethod(spoiled)


def the_backward_pass_does_not_round() -> None:
    product = rounded_products.multiplied

    def multiplied(x: Tensor, weight: Tensor, *others: Any) -> Tensor:
        return product(x, weight * 1.01 if not weight.is_contiguous() else weight, *others)

    rounded_products.multiplied = multiplied


def ranks_add_in_place_of_the_largest() -> None:
    def added(self: MatrixRounding, largest: Tensor) -> Tensor:
        if self.ranks is not None:
            dist.all_reduce(largest, group=self.ranks)
        return largest

    MatrixRounding._largest_of_ranks = added


@pytest.mark.parametrize(
    ("mutation", "kind", "model", "layout"),
    [
        (scales_are_of_each_shard, "w8", "llama", "megatron:tp2"),
        pytest.param(ranks_add_in_place_of_the_largest, "w8", "top_2", "deepspeed:tp2", marks=pytest.mark.whole_grid),
        pytest.param(rounding_has_no_gradient, "w8", "llama", "megatron:dp2", marks=pytest.mark.whole_grid),
        (the_backward_pass_does_not_round, "w4", "llama", "torch:dp2"),
    ],
)
def test_a_rule_that_is_broken_is_caught(mutation: Callable[[], None], kind: str, model: str, layout: str) -> None:
    config = quantize_run(kind, model)
    assert verdict(config, *laid_out(config, layout, 0), mutation=mutation).problems


def test_a_scale_of_a_shard_is_seen_in_the_weights() -> None:
    wrong = wrongly_rounded("w8", "llama", "fp32", "megatron:tp2", 0, scales_are_of_each_shard)
    assert wrong and all(name.endswith(("attention.out.weight", "mlp.down.weight")) for name in wrong)
