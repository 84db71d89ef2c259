"""Packing, rounding, and the scales of activations are those of compressed-tensors, bit for bit; those of weights a
little larger."""

import pytest
import torch

from llmtrain.interop.compressed.tensors import packed, unpacked
from llmtrain.models.rounded_inputs import rounded_tokens
from llmtrain.values.quantization import BEYOND, NumberGrid, round_to_nearest


def _weight(rows: int, columns: int) -> torch.Tensor:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))
    weight[1] = 0.0
    return weight


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("columns", [64, 33, 8, 1])
def test_packing(bits, columns):
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

    grid = NumberGrid(bits)
    numbers = torch.randint(grid.lowest, grid.highest + 1, (5, columns), generator=torch.Generator().manual_seed(bits))
    numbers = numbers.to(torch.int8)
    words = packed(numbers, bits)
    assert torch.equal(words, pack_to_int32(numbers, bits))
    assert torch.equal(unpacked(words, bits, columns), numbers)
    assert torch.equal(unpack_from_int32(words, bits, numbers.shape), numbers)


@pytest.mark.parametrize("group", [None, 16])
@pytest.mark.parametrize("bits", [4, 8])
def test_scales_and_numbers(bits, group):
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    weight = _weight(6, 64)
    args = QuantizationArgs(num_bits=bits, strategy="channel" if group is None else "group", group_size=group)
    made = round_to_nearest(weight, NumberGrid(bits, group))
    groups = weight.unflatten(1, (-1, group or 64))
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    torch.testing.assert_close(made.scale_OG, scale * BEYOND, rtol=2e-7, atol=1e-9)
    assert torch.equal(made.numbers_OI, quantize(weight, made.scale_OG, zero, args, dtype=torch.int8))
    assert torch.equal(made.dequantized(), dequantize(made.numbers_OI, made.scale_OG, zero, args))


def test_activations():
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import forward_quantize
    from compressed_tensors.quantization.quant_config import QuantizationStatus

    module = torch.nn.Linear(64, 2)
    module.quantization_status = QuantizationStatus.COMPRESSED  # type: ignore[assignment]
    args = QuantizationArgs(num_bits=8, strategy="token", dynamic=True)
    x = _weight(12, 64).unflatten(0, (3, 4))
    assert torch.equal(rounded_tokens(x), forward_quantize(module, x, "input", args))
