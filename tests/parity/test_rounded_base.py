"""A frozen base that lies in memory as whole numbers, in every engine and layout: the numbers of one process, and those
of a plain base that has the rounded weights."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import cycle
from typing import Any

import pytest
import torch
from torch import Tensor

from llmtrain.checks.parity.batches import probe_batches
from llmtrain.checks.parity.compare import LOW_PRECISION
from llmtrain.config.parameters import declare_parameters, quantized_linears
from llmtrain.config.schema import RunConfig
from llmtrain.engines import masters, torch_engine
from llmtrain.engines.masters import Placement
from llmtrain.engines.torch_engine import TorchEngine
from llmtrain.finetune.rounded_weights import RoundedWeights
from llmtrain.models.init import InitialWeights
from llmtrain.models.rounded_products import MatrixRounding, RoundedProduct
from llmtrain.parallel.layout import plan_layout
from llmtrain.train.setup import engine_class
from llmtrain.values.fragment import Box, Fragment, FragmentSource
from llmtrain.values.quantization import NumberGrid, NumberPacking, Quantized, round_to_nearest
from tests.parity.cases import HANGS_AFTER, finetune_run, parity_run, short_and_whole, verdict
from tests.parity.test_deepspeed import small_pieces
from tests.parity.test_freeze import FROZEN, LAYOUTS, PLACES, laid_out
from tests.parity.test_quantize import gradients
from tests.support.ranks import run_ranks

W4: dict[str, Any] = {"scheme": "w4a16", "group": 8}
W8: dict[str, Any] = {"scheme": "w8a16", "keep": ["attention.k"]}

GRID = [
    (method, *place)
    for method, place in [
        *zip(cycle(("lora", "some", "both", "prompt")), PLACES, strict=False),
        *((method, (layout, stage)) for method in ("experts", "switch")
          for layout, stage in (("megatron:dp2+ep2", 1), ("deepspeed:dp2+ep2", 2), ("megatron:tp2+sp", 0))),
        *((method, place) for method in ("bert", "t5")
          for place in (("megatron:pp2", 0), ("megatron:tp2+sp", 1), ("deepspeed:dp2", 3), ("megatron:cp2", 1))),
    ]
]  # fmt: skip
PAIRWISE = [
    *(("lora", "megatron:tp2+sp", 1), ("experts", "megatron:dp2+ep2", 1)),
    *(("lora", "deepspeed:tp2", 3), ("some", "megatron:pp2", 0)),
]


def rounded_run(method: str, precision: str = "fp32") -> RunConfig:
    """Of every other model the scales are of groups."""
    return finetune_run(method, precision).with_keys({"quantize": W8 if method in ("some", "experts", "t5") else W4})


@pytest.mark.parametrize(("method", "layout", "stage", "num_steps"), short_and_whole(PAIRWISE, GRID))
def test_fp32_equals_one_process(method: str, layout: str, stage: int, num_steps: int) -> None:
    assert layout in LAYOUTS
    config = rounded_run(method)
    assert verdict(config, *laid_out(config, layout, stage), num_steps=num_steps).problems == []


@pytest.mark.parametrize(
    ("method", "layout", "stage", "recompute"),
    [
        ("lora", "megatron:tp2+sp", 1, "none"),
        pytest.param("some", "deepspeed:dp2", 3, "full", marks=pytest.mark.whole_grid),
    ],
)
def test_bf16_stays_within_its_bounds(method: str, layout: str, stage: int, recompute: str) -> None:
    config = rounded_run(method, "bf16").with_keys({"train.recompute": recompute, "optim.eps": 1.0})
    assert verdict(config, *laid_out(config, layout, stage), levels=LOW_PRECISION).problems == []


@pytest.mark.parametrize("method", ["lora", "experts", pytest.param("t5", marks=pytest.mark.whole_grid)])
def test_it_computes_what_a_plain_base_with_the_rounded_weights_computes(method: str) -> None:
    config = rounded_run(method)
    assert config.quantize is not None
    plain = config.with_keys({"quantize": None})
    engine, other = TorchEngine(config, torch.device("cpu")), TorchEngine(plain, torch.device("cpu"))
    initial = InitialWeights(config.model, config.seed, config.finetune)
    other.load_weights(RoundedWeights(initial, config.model, config.quantize, "fp32", config.frozen))
    (loss, found), (expected_loss, expected) = gradients(engine, config), gradients(other, plain)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert found.keys() == expected.keys() and all("lora" in name for name in found)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-7, msg=name)
    assert {fragment.name for fragment in engine.fragments() if fragment.kind != "buffer"} == set(expected)


def weights_of(engine: Any) -> list[tuple[Tensor, Placement]]:
    """The weights that a rank computes with, and their places."""
    if engine.config.engine.name == "torch":
        return [(weight, engine.placements[name]) for name, weight in engine.parameters.items()]
    return list(engine.placements.items())


def held_on_rank(rank: int, size: int, config: RunConfig) -> dict[str, int]:
    """Bytes that this rank holds of each packed weight, after a step in which they have neither changed nor had a
    gradient."""
    if config.engine.name == "deepspeed":
        small_pieces()
    engine: Any = engine_class(config.engine.name)(config, torch.device("cpu"))
    layout = plan_layout(config.parallel, size)

    def packed() -> dict[str, Tensor]:
        frozen = [master for master in engine.frozen() if master.placement.packing is not None]
        assert all(not master.moments and master.grad is None for master in frozen)
        return {master.placement.name: master.weight.detach().view(torch.uint8).clone() for master in frozen}

    looked = False

    def look(fragments: Iterable[Fragment]) -> None:
        nonlocal looked
        looked = True
        assert all("lora" in fragment.name for fragment in fragments)
        for weight, place in weights_of(engine):
            assert place.packing is None or (weight.grad is None and not weight.requires_grad), place.name

    engine.inspect_gradients = look
    before = packed()
    engine.train_step(1, probe_batches(config, 1, layout.coordinates(rank).data, layout.data), 1e-3)
    after = packed()
    assert looked and before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    return {name: weight.nbytes for name, weight in after.items()}


@pytest.mark.parametrize(
    ("layout", "stage", "precision", "parts"),
    [("torch:dp2", 0, "fp32", 1), ("megatron:tp2+sp", 1, "bf16", 2), ("deepspeed:dp2", 3, "bf16", 2)],
)
def test_it_takes_half_a_byte_and_a_scale_without_gradients(
    layout: str, stage: int, precision: str, parts: int
) -> None:
    config = rounded_run("lora", precision)
    itemsize = {"fp32": 4, "bf16": 2}[precision]
    linears = {weight.name: weight.shape for _, weight in quantized_linears(config.model, ())}
    layout_run, ranks = laid_out(config, layout, stage)
    for packed in run_ranks(held_on_rank, ranks, layout_run, timeout_seconds=HANGS_AFTER):
        assert packed.keys() == linears.keys()
        for name, (outputs, inputs) in linears.items():
            assert packed[name] == outputs * (inputs / 2 + itemsize * inputs / 8) / parts, name


def test_a_packed_base_cannot_be_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that forgets to freeze it gets an error: there is no gradient for bits."""
    monkeypatch.setattr(torch_engine, "freeze", lambda parameters, frozen: None)
    config = rounded_run("lora")
    engine = TorchEngine(config, torch.device("cpu"))
    with pytest.raises(RuntimeError, match="invalid gradient"):
        engine.train_step(1, probe_batches(config, 1, 0, 1), 1e-3)


def kept_for_backward(config: RunConfig) -> int:
    """Bytes that a forward pass keeps beside parameters."""
    engine = TorchEngine(config, torch.device("cpu"))
    own = {parameter.untyped_storage().data_ptr() for parameter in engine.parameters.values()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        engine.train_step(1, probe_batches(config, 1, 0, 4)[:1], 1e-3)
    return sum(kept.values())


def test_no_dequantized_weight_is_kept() -> None:
    config = rounded_run("lora")
    matrices = sum(torch.Size(weight.shape).numel() * 4 for _, weight in quantized_linears(config.model, ()))
    difference = kept_for_backward(config) - kept_for_backward(config.with_keys({"quantize": None}))
    assert difference < matrices / 20


@pytest.mark.parametrize(("bits", "group", "inputs"), [(4, None, 7), (4, 8, 16), (8, None, 5), (8, 4, 12)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_packed_is_read_again(bits: int, group: int | None, inputs: int, dtype: torch.dtype) -> None:
    weight_OI = torch.randn(6, inputs, generator=torch.Generator().manual_seed(0))
    matrix = round_to_nearest(weight_OI, NumberGrid(bits, group), dtype)
    packing = NumberPacking(NumberGrid(bits, group), inputs, dtype)
    packed = packing.packed(matrix)
    assert packed.shape == (6, packing.width) and packed.dtype == dtype
    again = packing.unpacked(packed)
    assert torch.equal(again.numbers_OI, matrix.numbers_OI) and torch.equal(again.scale_OG, matrix.scale_OG)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_any_box_of_a_rounded_base_is_that_of_the_whole(precision: str) -> None:
    config = rounded_run("lora")
    assert config.quantize is not None
    base = RoundedWeights(
        InitialWeights(config.model, config.seed), config.model, config.quantize, precision, config.frozen
    )
    name, box = "decoder.layers.1.mlp.down.weight", Box((3, 10), (5, 20))
    outer = Box.whole(declare_parameters(config.model)[name].shape)
    assert torch.equal(base.read(name, "master", box), base.read(name, "master", outer)[box.slices_in(outer)])


def test_what_is_frozen_by_name_lies_packed_too() -> None:
    config = parity_run("dropout").with_keys({"optim.freeze": FROZEN["dropout"], "quantize": W4, "optim.eps": 1.0})
    engine = TorchEngine(config, torch.device("cpu"))
    packed = {name for name, place in engine.placements.items() if place.packing is not None}
    assert packed and all(name in config.frozen for name in packed)
    assert verdict(config, *laid_out(config, "megatron:tp2+sp", 1)).problems == []


def a_scale_is_of_this_ranks_inputs() -> None:
    whole = masters.read_packed

    def own(source: FragmentSource, placement: Placement, span: tuple[int, int], target: Tensor) -> None:
        class OwnInputs:
            def global_shape(self, name: str, kind: str) -> Any:
                return source.global_shape(name, kind)

            def read(self, name: str, kind: str, box: Box) -> Tensor:
                found = source.read(name, kind, box)
                first = placement.box.offsets[-1]
                found[..., :first] = 0
                found[..., first + placement.box.shape[-1] :] = 0
                return found

        whole(OwnInputs(), placement, span, target)

    masters.read_packed = own


def the_backward_pass_takes_other_numbers() -> None:
    round_weight, backward = MatrixRounding.weight, RoundedProduct.backward
    inside = False

    def spoiled(self: MatrixRounding, weight: Tensor, scale_OG: Tensor | None) -> Tensor:
        value = round_weight(self, weight, scale_OG)
        return value * 1.001 if inside else value

    def noted(ctx: Any, *grads: Tensor) -> Any:
        nonlocal inside
        inside = True
        found = backward(ctx, *grads)
        inside = False
        return found

    MatrixRounding.weight, RoundedProduct.backward = spoiled, staticmethod(noted)


def the_rest_of_an_output_is_that_of_the_next() -> None:
    whole = masters.read_packed

    def wrong(source: FragmentSource, placement: Placement, span: tuple[int, int], target: Tensor) -> None:
        whole(source, placement, span, target)
        assert placement.packing is not None
        width = placement.packing.width
        if rest := -span[0] % width:
            target[:rest] = target[width : width + rest].clone()

    masters.read_packed = wrong


def two_numbers_of_a_byte_change_places() -> None:
    unpacked = NumberPacking.unpacked

    def swapped(self: NumberPacking, packed_OW: Tensor) -> Quantized:
        found = unpacked(self, packed_OW)
        return replace(found, numbers_OI=found.numbers_OI.unflatten(1, (-1, 2)).flip(-1).flatten(1))

    NumberPacking.unpacked = swapped


@pytest.mark.parametrize(
    ("mutation", "method", "layout", "stage"),
    [
        (a_scale_is_of_this_ranks_inputs, "some", "megatron:tp2", 0),
        (two_numbers_of_a_byte_change_places, "lora", "torch:dp2", 0),
        (the_backward_pass_takes_other_numbers, "lora", "megatron:dp2", 0),
    ],
)
def test_a_rule_that_is_broken_is_caught(mutation: Callable[[], None], method: str, layout: str, stage: int) -> None:
    config = rounded_run(method)
    assert verdict(config, *laid_out(config, layout, stage), mutation=mutation).problems


@pytest.mark.parametrize("mutation", [None, the_rest_of_an_output_is_that_of_the_next])
def test_a_rank_of_zero_3_may_hold_half_an_output(mutation: Callable[[], None] | None) -> None:
    """Of an odd number of outputs: only then does a range begin within one."""
    config = rounded_run("some").with_keys({"model.ffn_hidden_size": 45})
    found = verdict(config, *laid_out(config, "deepspeed:dp2", 3), mutation=mutation).problems
    assert bool(found) == bool(mutation), found
