"""Writing a GGUF file: tensors are made one at a time. Equal content gives equal bytes."""

import os
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from torch import Tensor

from llmtrain.errors import ExportError
from llmtrain.interop.gguf.blocks import encode
from llmtrain.interop.gguf.file_format import (
    ALIGNMENT,
    MAGIC,
    SCALARS,
    VERSION,
    TensorType,
    Value,
    ValueType,
    aligned,
    stored_bytes,
)


@dataclass(frozen=True)
class GgufPart:
    """A tensor of a file: its numbers are asked for when it is its turn."""

    name: str
    shape: tuple[int, ...]
    type: TensorType
    read: Callable[[], Tensor]


def write_file(path: Path, metadata: Mapping[str, Value], tensors: Sequence[GgufPart]) -> None:
    """Write a new file, and return once it is on the disk.

    Raises ExportError for numbers that a type does not hold, OSError where the file system does not take it.
    """
    with path.open("xb") as file:
        file.write(MAGIC + struct.pack("<IQQ", VERSION, len(tensors), len(metadata)))
        for key, value in metadata.items():
            file.write(_text(key) + _value(value))
        offset = 0
        for tensor in tensors:
            dims = tensor.shape[::-1]
            row = struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, tensor.type, offset)
            file.write(_text(tensor.name) + row)
            offset = aligned(offset + stored_bytes(tensor.shape, tensor.type))
        _pad(file)
        for tensor in tensors:
            found = tensor.read().float()
            assert tuple(found.shape) == tensor.shape, f"{tensor.name} has {tuple(found.shape)}, not {tensor.shape}"
            try:
                file.write(encode(found, tensor.type))
            except ValueError as error:
                raise ExportError(f"{tensor.name}: {error}, so it cannot be written as {tensor.type.name}.") from None
            _pad(file)
        file.flush()
        os.fsync(file.fileno())


def _pad(file: IO[bytes]) -> None:
    file.write(bytes(aligned(file.tell(), ALIGNMENT) - file.tell()))


def _text(text: str) -> bytes:
    content = text.encode()
    return struct.pack("<Q", len(content)) + content


def _value(value: Value) -> bytes:
    """The kind of a value and its bytes."""
    if isinstance(value, str):
        return struct.pack("<I", ValueType.STRING) + _text(value)
    if not isinstance(value, list):
        kind = _kind(value, ValueType.UINT32)
        return struct.pack("<I", kind) + np.array(value, SCALARS[kind]).tobytes()
    kind = _kind(value[0], ValueType.INT32)
    head = struct.pack("<IIQ", ValueType.ARRAY, kind, len(value))
    if kind is ValueType.STRING:
        return head + b"".join(_text(str(text)) for text in value)
    return head + np.array(value, SCALARS[kind]).tobytes()


def _kind(value: bool | int | float | str, whole: ValueType) -> ValueType:
    match value:
        case bool():
            return ValueType.BOOL
        case int():
            return whole
        case float():
            return ValueType.FLOAT32
        case str():
            return ValueType.STRING
