"""Products with matrices in whole numbers, by two kernels of PyTorch for CPUs.

Their names begin with an underscore: PyTorch has no others for them. What each row comes to does not depend on how many
rows there are.

Shape suffixes: N rows, I inputs, O outputs, G groups of inputs, D digits of an input.
"""

from dataclasses import dataclass
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from llmtrain.models.rounded_inputs import largest_inputs, token_numbers
from llmtrain.values.quantization import Quantized

BASE, DIGITS = 256, 3
LARGEST = 0x7F7F7F
"""The largest number that is spelled by three digits between -128 and 127."""
_MIDDLE = 0x808080
"""A digit of 128 in each place."""
MOST_INPUTS = (1 << 31) // (1 << 14) - 1
"""So many products of two numbers of 8 bits are summed in 32 bits without an overflow."""
ROWS = 256
"""Rows that are multiplied at a time, so that the sums of a long prompt take little memory."""

KERNEL_GROUPS = (32, 64, 128, 256)
KERNEL_OUTPUTS = 16
"""Of the 4-bit kernel: inputs that may share a scale, and what divides its outputs."""


class Product(Protocol):
    """A matrix, and what it is multiplied by."""

    @property
    def num_bytes(self) -> int:
        """Of the matrix as it lies in memory."""
        ...

    def __call__(self, x_NI: Tensor) -> Tensor:
        """[N, O] in fp32."""
        ...


@cache
def sums_are_exact() -> bool:
    """True where this CPU sums products of 8-bit numbers without loss. One without VNNI cuts sums off at 16 bits, and
    nothing says so: it is tried with the largest numbers that there are."""
    numbers = torch.tensor([[-128], [127]], dtype=torch.int8).expand(2, 64).contiguous()
    return torch.equal(torch.ops.aten._int_mm(numbers, numbers.T).long(), numbers.long() @ numbers.long().T)


def digits_of(x_NI: Tensor) -> tuple[Tensor, Tensor]:
    """([D, N, I] of int8, the lowest digit first; [N, 1]): each row on a grid of its own of 2^24 numbers, as fine as
    fp32 has it next to the largest input."""
    scale_N1 = (x_NI.abs().amax(-1, keepdim=True) / LARGEST).clamp_min_(torch.finfo(x_NI.dtype).tiny)
    numbers_NI = (x_NI / scale_N1).round_().clamp_(-LARGEST, LARGEST).to(torch.int32)
    # With a half of each digit's range added, bytes are digits above -128; then the highest bit of each is turned.
    bytes_NID = numbers_NI.add_(_MIDDLE).bitwise_xor_(_MIDDLE).view(torch.int8).unflatten(-1, (-1, 4))
    return bytes_NID[..., :DIGITS].permute(2, 0, 1).contiguous(), scale_N1


@dataclass(frozen=True)
class WholeProduct:
    """8-bit numbers, with a scale for each output, times 8-bit digits of inputs; sums are exact.

    `rounds`: inputs are rounded to 8 bits, as the model's folder says. Otherwise they have three digits: the result
    differs from that in fp32 as two orders of its sums do.
    """

    numbers_OI: Tensor
    scale_O: Tensor
    rounds: bool = False

    @property
    def num_bytes(self) -> int:
        return self.numbers_OI.nbytes + self.scale_O.nbytes

    def __call__(self, x_NI: Tensor) -> Tensor:
        if not len(x_NI):
            return x_NI.new_empty(0, len(self.scale_O))
        return torch.cat([self._multiplied(rows) for rows in x_NI.split(ROWS)])

    def _multiplied(self, x_NI: Tensor) -> Tensor:
        if self.rounds:
            numbers_NI, scale_N1 = token_numbers(x_NI, largest_inputs(x_NI))
            sums_NO = torch.ops.aten._int_mm(numbers_NI.to(torch.int8), self.numbers_OI.T).float()
        else:
            digits_DNI, scale_N1 = digits_of(x_NI)
            sums_DNO = torch.ops.aten._int_mm(digits_DNI.flatten(0, 1), self.numbers_OI.T).unflatten(0, (DIGITS, -1))
            sums_NO = sums_DNO[-1].float()
            for lower_NO in reversed(sums_DNO[:-1].unbind()):
                sums_NO.mul_(BASE).add_(lower_NO)
        return sums_NO.mul_(scale_N1).mul_(self.scale_O)


@dataclass(frozen=True)
class FourBitProduct:
    """4-bit numbers with scales for groups of inputs, two in a byte as the kernel wants them, times inputs in bfloat16.

    Weights, inputs and outputs are rounded to bfloat16, as they are of a model in that type: each by 2^-9 at most.
    """

    words: Tensor
    scales_GO2: Tensor
    group: int

    @property
    def num_bytes(self) -> int:
        return self.words.nbytes + self.scales_GO2.nbytes

    def __call__(self, x_NI: Tensor) -> Tensor:
        if not len(x_NI):
            return x_NI.new_empty(0, self.scales_GO2.shape[1])
        x_NI = x_NI.to(torch.bfloat16)
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x_NI, self.words, self.group, self.scales_GO2).float()


def whole_product(matrix: Quantized, rounds: bool) -> WholeProduct:
    """Of a matrix with a scale for each output, and at most MOST_INPUTS inputs."""
    return WholeProduct(matrix.numbers_OI.contiguous(), matrix.scale_OG[:, 0].float().contiguous(), rounds)


def four_bit_product(matrix: Quantized) -> FourBitProduct:
    """Of a matrix of 4-bit numbers whose groups and outputs the kernel knows."""
    groups = matrix.scale_OG.shape[1]
    # The kernel has numbers from 0 to 15, and 8 stands for zero. The 1 is for GPUs.
    words = torch.ops.aten._convert_weight_to_int4pack_for_cpu(matrix.numbers_OI.int() + 8, 1)
    scale_GO = matrix.scale_OG.T.to(torch.bfloat16)
    scales_GO2 = torch.stack((scale_GO, torch.zeros_like(scale_GO)), -1).contiguous()
    return FourBitProduct(words, scales_GO2, matrix.numbers_OI.shape[1] // groups)
