"""The layout of a GGUF file: kinds of values and of tensors, and what is the same wherever one is read or written.

A file is a header (magic, version, two counts), pairs of keys and values, a row for each tensor, and then the tensors'
bytes, each from a multiple of the alignment on. All numbers are little-endian. Source: docs/gguf.md of ggml.
"""

from dataclasses import dataclass
from enum import IntEnum
from math import prod

MAGIC, VERSION = b"GGUF", 3
ALIGNMENT = 32
ALIGNMENT_KEY = "general.alignment"


class ValueType(IntEnum):
    """The kind of a value, as a file numbers it."""

    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12


SCALARS = {
    ValueType.UINT8: "u1", ValueType.INT8: "i1", ValueType.UINT16: "<u2", ValueType.INT16: "<i2",
    ValueType.UINT32: "<u4", ValueType.INT32: "<i4", ValueType.FLOAT32: "<f4", ValueType.BOOL: "u1",
    ValueType.UINT64: "<u8", ValueType.INT64: "<i8", ValueType.FLOAT64: "<f8",
}  # fmt: skip
"""numpy's name of each kind of fixed size."""

Value = bool | int | float | str | list[int] | list[float] | list[bool] | list[str]
"""A whole number is written as UINT32, those of a list as INT32; other numbers as FLOAT32."""


class TensorType(IntEnum):
    """The types of tensors that are read and written, as a file numbers them."""

    F32 = 0
    F16 = 1
    Q8_0 = 8
    BF16 = 30


OTHER_TYPES = {
    2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K",
    15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S",
    23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0",
    39: "MXFP4", 40: "NVFP4",
}  # fmt: skip
"""Names of types that are refused."""

QUANTIZED_BLOCK = 32
"""Values of a row that Q8_0 stores together: one fp16 factor, and an int8 for each."""

FILE_TYPES = {TensorType.F32: 0, TensorType.F16: 1, TensorType.Q8_0: 7, TensorType.BF16: 32}
"""`general.file_type` of a file that has most of its tensors in a type."""


@dataclass(frozen=True)
class GgufTensor:
    """A tensor's row: the shape as PyTorch has it (the file lists it backwards), its type, and where its bytes begin,
    counted from the first byte behind the rows."""

    name: str
    shape: tuple[int, ...]
    type: TensorType
    offset: int

    @property
    def num_bytes(self) -> int:
        return stored_bytes(self.shape, self.type)


def stored_bytes(shape: tuple[int, ...], type: TensorType) -> int:
    """The bytes that a tensor takes. The rows of a Q8_0 hold whole blocks."""
    size = prod(shape)
    match type:
        case TensorType.F32:
            return 4 * size
        case TensorType.Q8_0:
            return size // QUANTIZED_BLOCK * (QUANTIZED_BLOCK + 2)
        case _:
            return 2 * size


def aligned(position: int, alignment: int = ALIGNMENT) -> int:
    """The next position where a tensor may begin."""
    return -(-position // alignment) * alignment
