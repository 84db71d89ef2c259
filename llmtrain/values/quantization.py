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
        return weight_scale(self.largest(weight_OI), self.bits, dtype)

    def largest(self, weight_OI: Tensor) -> Tensor:
        """[O, G] in fp32: the largest absolute value of each group."""
        return weight_OI.float().unflatten(1, (self.num_groups(weight_OI.shape[1]), -1)).abs().amax(-1)

    def nearest(self, weight_OI: Tensor, scale_OG: Tensor) -> Tensor:
        """[O, I] of int8: each weight rounded to the nearest number."""
        scaled = weight_OI.float().unflatten(1, (scale_OG.shape[1], -1)) / scale_OG.float()[..., None]
        return scaled.round_().clamp_(self.lowest, self.highest).to(torch.int8).flatten(1)

    def own_scales(self, weight_OI: Tensor, dtype: torch.dtype) -> Tensor:
        """[O, G] of a type: the scale of each group whose weights lie on such a grid already, to the last bit; else 0.

        The largest weight is one of the grid's numbers times the scale, so there are few that it can be.
        """
        groups_OGI = weight_OI.float().unflatten(1, (self.num_groups(weight_OI.shape[1]), -1))
        largest_OG = groups_OGI.abs().amax(-1)
        found_OG = torch.zeros_like(largest_OG)
        for number in range(1, 1 - self.lowest):
            quotient_OG = largest_OG / number
            for beside in (quotient_OG, torch.inf * quotient_OG, torch.zeros_like(quotient_OG)):
                scale_OG = torch.nextafter(quotient_OG, beside)  # the product was rounded as well
                stored = (scale_OG != 0) & (scale_OG.to(dtype).float() == scale_OG)
                fits_OG = (found_OG == 0) & stored & (scale_OG * number == largest_OG)
                self._keep_multiples(groups_OGI, scale_OG, fits_OG)
                found_OG[fits_OG] = scale_OG[fits_OG]
        return found_OG.to(dtype)

    def _keep_multiples(self, groups_OGI: Tensor, scale_OG: Tensor, fits_OG: Tensor) -> None:
        """Set `fits_OG` to False where a weight of the group is none of the grid's numbers times the scale."""
        for few in (16, None):  # nearly all that do not fit are known by their first weights
            weights, steps = groups_OGI[..., :few][fits_OG], scale_OG[fits_OG][:, None]
            numbers = (weights / steps).round_().clamp_(self.lowest, self.highest)
            fits_OG[fits_OG.clone()] = (numbers * steps == weights).all(-1)


BEYOND = 1 + 2**-16
"""Scales of weights are larger by this than those of compressed-tensors' own rule, which puts the largest weight of a
group on the edge between two numbers, -7 and -8: its last bits, which differ between layouts, would say which."""


def weight_scale(largest: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """The scale of a group of weights whose largest absolute value is given."""
    return stored_scale(largest * BEYOND, bits, dtype)


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


def unless_rounded(weight_OI: Tensor, nearest: Quantized, grid: NumberGrid) -> Quantized:
    """What rounding has made of a matrix, but for groups that lie on the grid already: those stay what they are.

    So what a compressed folder holds is not rounded again, which would move it: the largest weight of a group need not
    be the grid's largest number. Scales are of the type that they are stored in.
    """
    own_OG = grid.own_scales(weight_OI, nearest.scale_OG.dtype)
    is_own_OG = own_OG != 0
    scale_OG = torch.where(is_own_OG, own_OG, nearest.scale_OG)
    is_own_OI = is_own_OG.repeat_interleave(weight_OI.shape[1] // is_own_OG.shape[1], 1)
    return Quantized(torch.where(is_own_OI, grid.nearest(weight_OI, scale_OG), nearest.numbers_OI), scale_OG)


@dataclass(frozen=True)
class NumberPacking:
    """How a matrix that is not trained lies in memory: of each output its numbers, two of 4 bits in a byte, and behind
    them its scales, as elements of the type of the weights. So whatever moves, gathers or parts weights may do so with
    it; only products look inside.

    `inputs` are those of this rank. With `keeps_rounded`, what was rounded when it is read stays: see `unless_rounded`.
    """

    grid: NumberGrid
    inputs: int
    dtype: torch.dtype
    keeps_rounded: bool = False

    @property
    def number_bytes(self) -> int:
        """Of an output."""
        return -(-self.inputs * self.grid.bits // 8)

    @property
    def width(self) -> int:
        """W: elements of an output."""
        return -(-self.number_bytes // self.dtype.itemsize) + self.grid.num_groups(self.inputs)

    def packed(self, matrix: Quantized) -> Tensor:
        """[O, W]."""
        numbers_OB = matrix.numbers_OI.view(torch.uint8)
        if self.grid.bits == 4:
            even = torch.nn.functional.pad(matrix.numbers_OI - self.grid.lowest, (0, self.inputs % 2)).view(torch.uint8)
            numbers_OB = even[:, 0::2] | (even[:, 1::2] << 4)
        padding = -self.number_bytes % self.dtype.itemsize
        scale_OB = matrix.scale_OG.to(self.dtype).contiguous().view(torch.uint8)
        return torch.cat((torch.nn.functional.pad(numbers_OB, (0, padding)), scale_OB), 1).view(self.dtype)

    def unpacked(self, packed_OW: Tensor) -> Quantized:
        """What `packed` has made; outputs may be stacked."""
        bytes_OB = packed_OW.contiguous().view(torch.uint8).flatten(0, -2)
        numbers_OB, groups = bytes_OB[:, : self.number_bytes], self.grid.num_groups(self.inputs)
        scale_OG = packed_OW.flatten(0, -2)[:, -groups:]
        if self.grid.bits == 8:
            return Quantized(numbers_OB.view(torch.int8), scale_OG)
        both = torch.stack((numbers_OB & 15, numbers_OB >> 4), -1).flatten(1)
        return Quantized(both[:, : self.inputs].view(torch.int8) + self.grid.lowest, scale_OG)
