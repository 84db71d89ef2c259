"""Reading a GGUF file that somebody else may have made: its header within bounds, its tensors one at a time.

Every count and length is held against the bytes that are there before anything is made for it. What is damaged, or is
more than such a file can have, is a DataError; types of tensors that are not read are named.
"""

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from llmtrain.errors import ConfigError, DataError
from llmtrain.files import open_regular
from llmtrain.interop.gguf.blocks import decode
from llmtrain.interop.gguf.file_format import (
    ALIGNMENT,
    ALIGNMENT_KEY,
    MAGIC,
    OTHER_TYPES,
    QUANTIZED_BLOCK,
    SCALARS,
    VERSION,
    GgufTensor,
    TensorType,
    ValueType,
    aligned,
)

LONGEST_HEADER = 64 << 20
"""The largest vocabularies take some 20 MB."""
_LONGEST_NAME = 1024
_MOST_DIMS = 4
_LARGEST_ALIGNMENT = 1 << 16
_SMALLEST_PAIR, _SMALLEST_ROW = 8 + 4 + 1, 8 + 4 + 8 + 4 + 8


@dataclass(frozen=True)
class GgufHeader:
    """What stands before the tensors; `begin` is where they begin."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]
    begin: int

    def tensor(self, name: str) -> Tensor:
        """A whole tensor in fp32. Raises DataError for numbers that are none."""
        info = self.tensors[name]
        try:
            with open_regular(self.path) as file:
                file.seek(self.begin + info.offset)
                content = file.read(info.num_bytes)
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read: {error.strerror}") from None
        if len(content) < info.num_bytes:
            raise DataError(f"{self.path}: ends inside of {name}. Copy the file again.")
        found = decode(content, info.type, info.shape)
        if not bool(torch.isfinite(found).all()):
            raise DataError(f"{self.path}: {name} holds numbers that are none (NaN) or infinite.")
        return found


class _Cursor:
    """Reads on from the beginning of a file, within its size and the bounds of a header."""

    def __init__(self, path: Path, file: IO[bytes]) -> None:
        self.path, self._file = path, file
        self.size = os.fstat(file.fileno()).st_size
        self.place = 0

    def damaged(self, what: str) -> DataError:
        return DataError(f"{self.path}: {what} (before byte {self.place:,}). Copy the file again.")

    def take(self, count: int, what: str) -> bytes:
        if count > self.size - self.place:
            raise self.damaged(f"{what} has {count:,} bytes, and the file ends after {self.size - self.place:,}")
        if self.place + count > LONGEST_HEADER:
            raise self.damaged(f"{what} ends behind {LONGEST_HEADER:,} bytes, more than a header can have")
        content = self._file.read(count)
        if len(content) < count:
            raise self.damaged(f"it ends inside of {what}")
        self.place += count
        return content

    def number(self, form: str, what: str) -> int:
        return struct.unpack(f"<{form}", self.take(struct.calcsize(f"<{form}"), what))[0]

    def count(self, smallest: int, what: str) -> int:
        """A number of things that take at least so many bytes each."""
        found = self.number("Q", what)
        if found * smallest > self.size - self.place:
            raise self.damaged(f"{what} is {found:,}, for which the file is too short")
        return found

    def text(self, what: str, longest: int = LONGEST_HEADER) -> str:
        length = self.number("Q", f"the length of {what}")
        if length > longest:
            raise self.damaged(f"{what} has {length:,} bytes; at most {longest:,} are read")
        try:
            return self.take(length, what).decode("utf-8")
        except UnicodeDecodeError:
            raise self.damaged(f"{what} is no UTF-8") from None


def read_header(path: Path) -> GgufHeader:
    """Raises ConfigError where there is no GGUF file or it holds types that are not read, DataError for a damaged
    one."""
    try:
        with open_regular(path) as file:
            return _header(_Cursor(path, file))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file. Give a GGUF file.") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None


def _header(cursor: _Cursor) -> GgufHeader:
    if cursor.size < 4 or cursor.take(4, "the magic") != MAGIC:
        raise DataError(f"{cursor.path}: is no GGUF file: it does not begin with GGUF.")
    version = cursor.number("I", "the version")
    if version not in (2, VERSION):
        other = ": its numbers are big-endian" if version in (2 << 24, VERSION << 24) else ""
        raise ConfigError(f"{cursor.path}: has GGUF version {version}{other}; versions 2 and 3 are read.")
    num_tensors = cursor.count(_SMALLEST_ROW, "the number of tensors")
    metadata: dict[str, Any] = {}
    for _ in range(cursor.count(_SMALLEST_PAIR, "the number of keys")):
        key = cursor.text("a key", _LONGEST_NAME)
        if key in metadata:
            raise cursor.damaged(f"the key {key[:80]!r} stands there twice")
        metadata[key] = _value(cursor, cursor.number("I", f"the kind of {key}"), f"the value of {key[:80]!r}")
    alignment = metadata.get(ALIGNMENT_KEY, ALIGNMENT)
    if type(alignment) is not int or not 1 <= alignment <= _LARGEST_ALIGNMENT or alignment & (alignment - 1):
        raise cursor.damaged(f"{ALIGNMENT_KEY} = {str(alignment)[:40]}: must be a power of two up to 65,536")
    rows = list(_iter_rows(cursor, num_tensors))
    begin = aligned(cursor.place, alignment)
    _require_places(cursor, rows, begin, alignment)
    return GgufHeader(cursor.path, metadata, {row.name: row for row in rows}, begin)


def _value(cursor: _Cursor, kind: int, what: str) -> Any:
    if kind == ValueType.STRING:
        return cursor.text(what)
    if kind == ValueType.ARRAY:
        inner = cursor.number("I", what)
        if inner == ValueType.STRING:
            return [cursor.text(what) for _ in range(cursor.count(8, f"the length of {what}"))]
        form = _form(cursor, inner, what)
        length = cursor.count(form.itemsize, f"the length of {what}")
        return np.frombuffer(cursor.take(length * form.itemsize, what), form).tolist()
    form = _form(cursor, kind, what)
    found = np.frombuffer(cursor.take(form.itemsize, what), form)[0].item()
    if kind == ValueType.BOOL:
        if found not in (0, 1):
            raise cursor.damaged(f"{what} is {found}, and must be true or false")
        return bool(found)
    return found


def _form(cursor: _Cursor, kind: int, what: str) -> np.dtype[Any]:
    if kind not in SCALARS:
        raise cursor.damaged(f"{what} is of the kind {kind}, which is none, or of lists in lists")
    return np.dtype(SCALARS[ValueType(kind)])


def _iter_rows(cursor: _Cursor, num_tensors: int) -> Iterator[GgufTensor]:
    seen = set[str]()
    for _ in range(num_tensors):
        name = cursor.text("the name of a tensor", _LONGEST_NAME)
        if name in seen:
            raise cursor.damaged(f"the tensor {name[:80]!r} stands there twice")
        seen.add(name)
        num_dims = cursor.number("I", f"the shape of {name}")
        if not 1 <= num_dims <= _MOST_DIMS:
            raise cursor.damaged(f"{name[:80]} has {num_dims} dimensions; tensors have 1 to {_MOST_DIMS}")
        shape = struct.unpack(f"<{num_dims}Q", cursor.take(8 * num_dims, f"the shape of {name}"))[::-1]
        kind, offset = cursor.number("I", f"the type of {name}"), cursor.number("Q", f"the place of {name}")
        if kind not in list(TensorType):
            other = OTHER_TYPES.get(kind, f"an unknown type, {kind}")
            raise ConfigError(
                f"{cursor.path}: {name[:80]} is stored as {other}; can import "
                f"{', '.join(known.name for known in TensorType)}. Convert the original again, in one of these."
            )
        if kind == TensorType.Q8_0 and shape[-1] % QUANTIZED_BLOCK:
            raise cursor.damaged(f"{name[:80]} has rows of {shape[-1]}, and Q8_0 has blocks of {QUANTIZED_BLOCK}")
        yield GgufTensor(name, shape, TensorType(kind), offset)


def _require_places(cursor: _Cursor, rows: list[GgufTensor], begin: int, alignment: int) -> None:
    """Raise DataError where tensors are empty, lie over each other, or behind the end of the file."""
    end = 0
    for row in sorted(rows, key=lambda row: row.offset):
        if not row.num_bytes:
            raise cursor.damaged(f"{row.name[:80]} has the shape {list(row.shape)}")
        if row.offset % alignment:
            raise cursor.damaged(f"{row.name[:80]} begins at {row.offset:,}, no multiple of {alignment}")
        if row.offset < end:
            raise cursor.damaged(f"{row.name[:80]} begins at {row.offset:,}, inside of another tensor")
        end = row.offset + row.num_bytes
        if begin + end > cursor.size:
            raise cursor.damaged(
                f"{row.name[:80]} ends at byte {begin + end:,}, and the file has {cursor.size:,}: it is cut off"
            )
