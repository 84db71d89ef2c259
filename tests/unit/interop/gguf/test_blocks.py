"""Q8_0 and the other types: bytes, bounds, and the way back."""

import numpy as np
import pytest
import torch

from llmtrain.interop.gguf.blocks import decode, encode, rounded
from llmtrain.interop.gguf.file_format import TensorType, stored_bytes


def _as_ggml(row: np.ndarray) -> bytes:
    """ggml's quantize_row_q8_0_ref, one number at a time."""
    largest = np.float32(max(abs(value) for value in row))
    scale = largest / np.float32(127)
    inverse = np.float32(1) / scale if scale else np.float32(0)
    values = [int(np.float32(value) * inverse + np.copysign(np.float32(0.5), value)) for value in row]
    return np.float16(scale).tobytes() + np.array(values, np.int8).tobytes()


def test_q8_0_has_the_bytes_of_ggml():
    generator = torch.Generator().manual_seed(3)
    blocks = torch.randn(40, 32, generator=generator) * torch.logspace(-6, 3, 40)[:, None]
    blocks[7] = 0
    blocks[8] = torch.arange(32) / 2 - 8  # halves are rounded away from zero
    blocks[8, 0] = 127.0
    assert encode(blocks, TensorType.Q8_0) == b"".join(_as_ggml(row) for row in blocks.numpy())


@pytest.mark.parametrize("type", list(TensorType))
def test_numbers_come_back(type):
    tensor = torch.randn(6, 64, generator=torch.Generator().manual_seed(1))
    content = encode(tensor, type)
    assert len(content) == stored_bytes((6, 64), type)
    found = decode(content, type, (6, 64))
    allowed = {TensorType.F32: 0.0, TensorType.F16: 2**-11, TensorType.BF16: 2**-8, TensorType.Q8_0: 1 / 127}[type]
    assert float((found - tensor).abs().max()) <= allowed * float(tensor.abs().max())
    assert torch.equal(rounded(found, type), found) or type is TensorType.Q8_0


def test_numbers_too_small_for_q8_0_become_zero():
    assert decode(encode(torch.full((1, 32), 1e-44), TensorType.Q8_0), TensorType.Q8_0, (32,)).tolist() == [0.0] * 32


@pytest.mark.parametrize("type", list(TensorType))
def test_what_is_no_number_is_refused(type):
    for wrong in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="NaN"):
            encode(torch.full((1, 32), wrong), type)


@pytest.mark.parametrize("type", [TensorType.F16, TensorType.Q8_0])
def test_what_is_too_large_is_refused(type):
    with pytest.raises(ValueError, match="too large"):
        encode(torch.full((1, 32), 1e8), type)
