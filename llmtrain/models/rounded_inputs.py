"""Linears whose inputs are rounded to whole numbers, as a quantized model's folder says: each position by itself.

Shape suffix: I inputs.
"""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from llmtrain.values.quantization import NumberGrid, stored_scale

BITS = 8


def round_inputs(model: nn.Module, linears: Iterable[str]) -> None:
    """Round what goes into linears, by their global names, from now on."""
    for name in linears:
        model.get_submodule(name).register_forward_pre_hook(_rounded)


def _rounded(linear: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return rounded_tokens(inputs[0]), *inputs[1:]


def rounded_tokens(x: Tensor) -> Tensor:
    """Activations [..., I] on a grid whose scale is that of their own position: dynamic quantization per token."""
    return rounded_to(x, largest_inputs(x))


def largest_inputs(x: Tensor) -> Tensor:
    """[..., 1]: the largest absolute value of each position."""
    return x.abs().amax(-1, keepdim=True)


def rounded_to(x: Tensor, largest: Tensor) -> Tensor:
    """Activations on the grid of 8 bits that reaches to the largest of their position."""
    grid, scale = NumberGrid(BITS), stored_scale(largest, BITS, x.dtype)
    return (x / scale).round_().clamp_(grid.lowest, grid.highest).mul_(scale)
