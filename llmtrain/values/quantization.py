"""Matrices and activations in whole numbers: symmetric grids around zero, as compressed-tensors has them.

Shape suffixes: O outputs, I inputs, G groups of inputs.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class NumberGrid:
    """The grid of a matrix: bits of a number, and how many inputs of an output share a scale; None: all of them."""

    bits: int
    group: int | None = None

    @property
    def lowest(self) -> int:
        return -(1 << (self.bits - 1))

    @property
    def highest(self) -> int:
        return (1 << (self.bits - 1)) - 1

    def num_groups(self, inputs: int) -> int:
        """G of a matrix; the group divides its inputs."""
        return 1 if self.group is None else inputs // self.group

    def scales(self, weight_OI: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """[O, G]: the largest weight of each group lies at the end of the grid. Rounded to the type that they are
        stored in, before anything is rounded with them."""
        return stored_scale(self.largest(weight_OI), self.bits, dtype)

    def largest(self, weight_OI: Tensor) -> Tensor:
        """[O, G] in fp32: the largest absolute value of each group."""
        return weight_OI.float().unflatten(1, (self.num_groups(weight_OI.shape[1]), -1)).abs().amax(-1)

    def nearest(self, weight_OI: Tensor, scale_OG: Tensor) -> Tensor:
        """[O, I] of int8: each weight rounded to the nearest number."""
        scaled = weight_OI.float().unflatten(1, (scale_OG.shape[1], -1)) / scale_OG.float()[..., None]
        return scaled.round_().clamp_(self.lowest, self.highest).to(torch.int8).flatten(1)


def stored_scale(largest: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """The scale of a group whose largest absolute value is given. A group of zeros has one that is not zero."""
    scale = (largest / (((1 << bits) - 1) / 2)).to(dtype)
    return torch.where(scale == 0, torch.finfo(dtype).eps, scale)


@dataclass(frozen=True)
class Quantized:
    """A matrix as whole numbers [O, I] of int8, and the scales [O, G] of their groups."""

    numbers_OI: Tensor
    scale_OG: Tensor

    def dequantized(self) -> Tensor:
        """[O, I] in fp32."""
        numbers_OGI = self.numbers_OI.float().unflatten(1, (self.scale_OG.shape[1], -1))
        return (numbers_OGI * self.scale_OG.float()[..., None]).flatten(1)


def round_to_nearest(weight_OI: Tensor, grid: NumberGrid, dtype: torch.dtype = torch.float32) -> Quantized:
    """Every weight rounded by itself, with scales of a type."""
    scale_OG = grid.scales(weight_OI, dtype)
    return Quantized(grid.nearest(weight_OI, scale_OG), scale_OG)
