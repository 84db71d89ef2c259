"""Products with weights, and inputs, that are rounded to whole numbers, while the weights are trained, or others are.

Forward and backward compute with what a weight is rounded to. Its gradient is that of the rounded weight, as if
rounding had changed nothing: straight through (Bengio et al. 2013; Jacob et al. 2017, section 3). Rounded weights exist
while they are multiplied and no longer: the backward pass rounds again. Weights that are not trained are rounded once,
and lie packed (Dettmers et al. 2023, section 3, with grids in place of their table of 16 floats).

Shape suffixes: O outputs, I inputs, G groups of inputs, P pairs of a token and an expert, E experts.
"""

from dataclasses import dataclass
from functools import cache, partial
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from llmtrain.config.finetune import QuantizeConfig
from llmtrain.config.parameters import FrozenNames, quantized_linears
from llmtrain.models.compiled_graphs import outside_of_graphs
from llmtrain.models.experts.mixture import Experts, grouped_linear, grouped_weight_gradient
from llmtrain.models.rounded_inputs import largest_inputs, rounded_to
from llmtrain.models.transformer import Transformer
from llmtrain.values.quantization import NumberGrid, NumberPacking, Quantized, weight_scale

Counts = Tensor | list[int]
"""As in `grouped_linear`."""


@dataclass(frozen=True)
class Rounding:
    """How a run rounds: its section, the type of its weights, in which scales are kept as well, and which of them are
    not trained: those lie in memory as they are rounded."""

    quantize: QuantizeConfig
    dtype: torch.dtype
    frozen: FrozenNames


@dataclass(frozen=True, eq=False)
class MatrixRounding:
    """How a weight, and what goes into it, is rounded in its products.

    `ranks` are the tensor ranks that hold other inputs of the same outputs, where they do. `packing`: the weight is
    packed, and has its scales with it.
    """

    grid: NumberGrid
    dtype: torch.dtype
    rounds_inputs: bool = False
    ranks: ProcessGroup | None = None
    packing: NumberPacking | None = None

    def scales(self, weight: Tensor) -> Tensor | None:
        """[O, G], of stacked experts [E x O, G]; the same on all of `ranks`."""
        if self.packing is not None:
            return None
        largest_OG = self.grid.largest(weight.flatten(0, -2))
        # A group lies on one rank (config/rules/compression.py); all inputs of an output lie on all of them.
        if self.grid.group is None:
            self._largest_of_ranks(largest_OG)
        return weight_scale(largest_OG, self.grid.bits, self.dtype)

    def weight(self, weight: Tensor, scale_OG: Tensor | None) -> Tensor:
        """What `llmtrain compress` would write of the weight, read again."""
        if scale_OG is None:
            assert self.packing is not None, "scales are with the weight"
            matrix = self.packing.unpacked(weight).dequantized()
            return matrix.to(weight.dtype).view(*weight.shape[:-1], self.packing.inputs)
        numbers = self.grid.nearest(weight.flatten(0, -2), scale_OG)
        return Quantized(numbers, scale_OG).dequantized().to(weight.dtype).view_as(weight)

    def largest_inputs(self, x: Tensor) -> Tensor | None:
        """What `inputs` rounds by; the same on all of `ranks`."""
        return self._largest_of_ranks(largest_inputs(x).float()).to(x.dtype) if self.rounds_inputs else None

    def inputs(self, x: Tensor, largest: Tensor | None) -> Tensor:
        """What is multiplied by the weight."""
        return x if largest is None else rounded_to(x, largest)

    def _largest_of_ranks(self, largest: Tensor) -> Tensor:
        if self.ranks is not None:
            # They go through the same products in the same order: all of them are here.
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self.ranks)
        return largest


def multiplied(x: Tensor, weight: Tensor, counts: Counts | None, bias: Tensor | None = None) -> Tensor:
    """x W^T + b; with counts, rows times the transposed weight of their expert."""
    return F.linear(x, weight, bias) if counts is None else grouped_linear(x, weight, counts)


class RoundedProduct(torch.autograd.Function):
    """x W^T + b of a rounded weight. What is kept for the backward pass is the weight itself, and the scales."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, rounding: MatrixRounding, counts: Counts | None
    ) -> Tensor:
        scale_OG, largest = rounding.scales(weight), rounding.largest_inputs(x)
        kept = x if ctx.needs_input_grad[1] else None  # of what is frozen the input is nobody's factor
        ctx.save_for_backward(kept, weight, scale_OG, largest)
        ctx.rounding, ctx.counts = rounding, counts
        return multiplied(rounding.inputs(x, largest), rounding.weight(weight, scale_OG), counts, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        x, weight, scale_OG, largest = ctx.saved_tensors
        rounding, counts, d_y = ctx.rounding, ctx.counts, grads[0]
        d_x = d_weight = d_bias = None
        if ctx.needs_input_grad[0]:
            d_x = multiplied(d_y, rounding.weight(weight, scale_OG).transpose(-1, -2), counts)
        if ctx.needs_input_grad[1]:
            x = rounding.inputs(x, largest)
            if counts is None:
                d_weight = d_y.flatten(0, -2).T @ x.flatten(0, -2)
            else:
                d_weight = grouped_weight_gradient(d_y, x, counts)
        if ctx.needs_input_grad[2]:
            d_bias = d_y.flatten(0, -2).sum(0)
        return d_x, d_weight, d_bias, None, None


def rounded_product(
    x: Tensor, weight: Tensor, bias: Tensor | None, rounding: MatrixRounding, counts: Counts | None = None
) -> Tensor:
    """x W^T + b of a rounded weight; a compiled layer calls it as it is, so that numbers stay the same."""
    return outside_of_graphs(RoundedProduct.apply, x, weight, bias, rounding, counts)


class RoundedLinear(nn.Module):
    """The part of a class of torch's linears that rounds. Made by `round_products`."""

    rounding: MatrixRounding
    weight: nn.Parameter
    bias: nn.Parameter | None

    def forward(self, x: Tensor) -> Tensor:
        return rounded_product(x, self.weight, self.bias, self.rounding)


class RoundedSplitLinear(nn.Module):
    """The part of a class of megatron-core's linears that rounds: in place of the product of their forward pass, behind
    and before what ranks say to each other."""

    rounding: MatrixRounding

    def _forward_impl(self, input: Tensor, weight: Tensor, bias: Tensor | None = None, **_: Any) -> Tensor:
        return rounded_product(input, weight, bias, self.rounding)


@cache
def rounded_class(linear: type[nn.Module]) -> type[nn.Module]:
    """The class of a linear that rounds."""
    part: type[nn.Module] = RoundedLinear if issubclass(linear, nn.Linear) else RoundedSplitLinear
    return cast(type[nn.Module], type(f"Rounded{linear.__name__}", (part, linear), {}))


def round_products(
    model: Transformer, rounding: Rounding, ranks: ProcessGroup | None = None
) -> dict[str, NumberPacking]:
    """Let the linears of a model's layers round, but those that the section keeps; call on the meta device. Returns how
    those are packed that are not trained, by the name of the weight.

    `ranks` are the tensor ranks, where they have split the linears. A linear becomes one of another class in place, so
    call before a finetuning adds its own to them.
    """
    numbers, modules = rounding.quantize.numbers, dict[str, nn.Module](model.named_modules())
    grid, packings = NumberGrid(numbers.bits, numbers.group), dict[str, NumberPacking]()
    for name, weight in quantized_linears(model.config, rounding.quantize.keep):
        module = modules.get(name.rpartition(".")[0] if weight.expert else name)
        if module is None:  # of another stage
            continue
        leaf, packing = weight.name.rpartition(".")[2], None
        held = getattr(module, leaf)
        if weight.name in rounding.frozen:
            keeps_rounded = rounding.frozen.is_base(weight.name)
            packings[weight.name] = packing = NumberPacking(grid, held.shape[-1], rounding.dtype, keeps_rounded)
            setattr(module, leaf, nn.Parameter(held.new_empty(*held.shape[:-1], packing.width)))
        of_ranks = ranks if weight.split == len(weight.shape) - 1 else None
        of_matrix = MatrixRounding(grid, rounding.dtype, numbers.rounds_inputs, of_ranks, packing)
        if isinstance(module, Experts):
            module.products[leaf] = partial(_rounded_experts, of_matrix)
        else:
            module.__class__ = rounded_class(type(module))
            cast(RoundedLinear, module).rounding = of_matrix
    return packings


def _rounded_experts(rounding: MatrixRounding, x_PI: Tensor, weight_EOI: Tensor, counts: Counts) -> Tensor:
    """In place of `grouped_linear`."""
    return rounded_product(x_PI, weight_EOI, None, rounding, counts)
