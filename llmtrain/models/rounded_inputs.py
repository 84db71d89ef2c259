"""Linears whose inputs are rounded to whole numbers, as a quantized model's folder says, or as they were in training:
each position by itself.

Shape suffixes: O outputs, I inputs, P pairs of a token and an expert, E experts.
"""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from llmtrain.models.experts.mixture import Experts, grouped_linear
from llmtrain.values.quantization import NumberGrid, stored_scale

BITS = 8


def round_inputs(model: nn.Module, linears: Iterable[str]) -> None:
    """Round what goes into linears, and weights of experts, by their global names, from now on."""
    for name in linears:
        owner, _, leaf = name.rpartition(".")
        experts = model.get_submodule(owner)
        if isinstance(experts, Experts):
            experts.products[leaf] = _rounded_experts
        else:
            model.get_submodule(name).register_forward_pre_hook(_rounded)


def _rounded(linear: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return rounded_tokens(inputs[0]), *inputs[1:]


def _rounded_experts(x_PI: Tensor, weight_EOI: Tensor, counts: Tensor | list[int]) -> Tensor:
    """In place of `grouped_linear`."""
    return grouped_linear(rounded_tokens(x_PI), weight_EOI, counts)


def rounded_tokens(x: Tensor) -> Tensor:
    """Activations [..., I] on a grid whose scale is that of their own position: dynamic quantization per token."""
    return rounded_to(x, largest_inputs(x))


def largest_inputs(x: Tensor) -> Tensor:
    """[..., 1]: the largest absolute value of each position."""
    return x.abs().amax(-1, keepdim=True)


def rounded_to(x: Tensor, largest: Tensor) -> Tensor:
    """Activations on the grid of 8 bits that reaches to the largest of their position."""
    numbers, scale = token_numbers(x, largest)
    return numbers.mul_(scale)


def token_numbers(x: Tensor, largest: Tensor) -> tuple[Tensor, Tensor]:
    """([..., I] whole numbers in the type of the activations, [..., 1] their scale): see `rounded_to`."""
    grid, scale = NumberGrid(BITS), stored_scale(largest, BITS, x.dtype)
    return (x / scale).round_().clamp_(grid.lowest, grid.highest), scale
