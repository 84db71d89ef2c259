"""Numbers of tensors as bytes of a GGUF file, and back. Q8_0 has the bytes that ggml's own quantization gives."""

import numpy as np
import torch
from torch import Tensor

from llmtrain.interop.gguf.file_format import QUANTIZED_BLOCK, TensorType

_LARGEST = 127
_BLOCK = np.dtype([("scale", "<f2"), ("values", "i1", QUANTIZED_BLOCK)])
_DTYPES = {TensorType.F32: torch.float32, TensorType.F16: torch.float16, TensorType.BF16: torch.bfloat16}


def encode(tensor: Tensor, type: TensorType) -> bytes:
    """The bytes of an fp32 tensor. Rows of Q8_0 are multiples of 32.

    Raises ValueError for numbers that the type does not hold: none at all, or too large.
    """
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError("it holds numbers that are none (NaN) or infinite")
    if type is TensorType.Q8_0:
        return _quantized(tensor)
    stored = tensor.to(_DTYPES[type]).contiguous()
    if not bool(torch.isfinite(stored).all()):
        raise ValueError(f"it holds {float(tensor.abs().max()):.3g}, which is too large for {type.name}")
    return (stored.view(torch.int16) if type is not TensorType.F32 else stored).numpy().tobytes()


def decode(content: bytes, type: TensorType, shape: tuple[int, ...]) -> Tensor:
    """The fp32 tensor of `stored_bytes` many bytes."""
    if type is TensorType.Q8_0:
        blocks = np.frombuffer(content, _BLOCK)
        scales, values = torch.from_numpy(blocks["scale"].astype("f4")), torch.from_numpy(blocks["values"].copy())
        return (scales[:, None] * values).reshape(shape)
    if type is TensorType.F32:
        return torch.from_numpy(np.frombuffer(content, "<f4").copy()).reshape(shape)
    return torch.from_numpy(np.frombuffer(content, "<i2").copy()).view(_DTYPES[type]).float().reshape(shape)


def rounded(tensor: Tensor, type: TensorType) -> Tensor:
    """The fp32 tensor that a reader finds in place of this one."""
    return decode(encode(tensor, type), type, tuple(tensor.shape))


def _quantized(tensor: Tensor) -> bytes:
    """Of each block the factor max|x| / 127, and x divided by it, rounded half away from zero. ggml rounds by the
    factor before it is rounded to fp16 itself."""
    rows = tensor.float().reshape(-1, QUANTIZED_BLOCK).numpy()
    scales = (np.abs(rows).max(-1, keepdims=True) / np.float32(_LARGEST)).astype("f4")
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.float32(1) / scales
        stored = scales[:, 0].astype("<f2")
    if not np.isfinite(stored).all():
        raise ValueError(f"it holds {float(tensor.abs().max()):.3g}, which is too large for Q8_0")
    inverse[np.isinf(inverse)] = 0  # of blocks of zeros, and of numbers that are none in fp16
    blocks = np.empty(len(rows), _BLOCK)
    scaled = rows * inverse
    blocks["scale"], blocks["values"] = stored, np.copysign(np.floor(np.abs(scaled) + 0.5), scaled)
    return blocks.tobytes()
