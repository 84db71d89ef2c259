"""Reading parts of the tensors of one safetensors file: the bytes that are asked for, into memory that is there.

Mapping the file, as the safetensors library does, lets the kernel read ahead of every page that is touched: half of the
rows of a tensor then costs the whole of it, an eighth of its columns eight times as much as is needed, and all of it
counts as this process's memory. So parts are read with calls of their own; the disk is told of them beforehand, which
keeps it as busy as reading everything would.
"""

import os
import weakref
from dataclasses import dataclass
from itertools import product
from math import prod
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from numpy.lib.stride_tricks import as_strided
from pydantic import AfterValidator, BaseModel, ConfigDict, NonNegativeInt
from torch import Tensor

from llmtrain.checkpoint.tensor_file import DTYPES, LENGTH_BYTES, PAGE_BYTES
from llmtrain.errors import CheckpointError
from llmtrain.files import parse_json
from llmtrain.values.fragment import Box

LONGEST_HEADER_BYTES = 100_000_000  # as in the safetensors library

SCRATCH_BYTES = 8 << 20
"""Memory for data that cannot be read right into its place."""

IN_ANY_ORDER = getattr(os, "POSIX_FADV_RANDOM", 0)
WILL_NEED = getattr(os, "POSIX_FADV_WILLNEED", 0)


@dataclass(frozen=True)
class StoredTensor:
    """The place of a tensor in its file: row-major from byte `start`. `dtype` is safetensors' name of the type."""

    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def end(self) -> int:
        return self.start + prod(self.shape) * DTYPES[self.dtype].itemsize


def _known_dtype(name: str) -> str:
    if name not in DTYPES:
        raise ValueError(f"allowed are {', '.join(DTYPES)}")
    return name


class _HeaderEntry(BaseModel):
    model_config = ConfigDict(extra="forbid")

    dtype: Annotated[str, AfterValidator(_known_dtype)]
    shape: tuple[NonNegativeInt, ...]
    data_offsets: tuple[NonNegativeInt, NonNegativeInt]


class Scratch:
    """Memory that all files of a reader share, kept from use to use."""

    def __init__(self) -> None:
        self._of_use: dict[str, np.ndarray] = {}

    def take(self, use: str, size: int) -> np.ndarray:
        """So many bytes, valid until the next call for the same use."""
        if len(self._of_use.get(use, ())) < size:
            self._of_use[use] = np.empty(size, np.uint8)
        return self._of_use[use][:size]


class StoredTensors:
    """An open safetensors file."""

    def __init__(self, path: Path, scratch: Scratch) -> None:
        """Raises OSError where the file cannot be opened, ValueError where it is not a safetensors file."""
        self.path = path
        self._scratch = scratch
        self._descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)  # readers drop files without closing them
        _advise(self._descriptor, 0, 0, IN_ANY_ORDER)
        self.tensors = self._read_header()
        """By key; the dtype is safetensors' name."""

    def _read_header(self) -> dict[str, StoredTensor]:
        """The tensors in the order in which they lie, end to end, from the header to the end of the file."""
        size = os.fstat(self._descriptor).st_size
        header_bytes = int.from_bytes(os.pread(self._descriptor, LENGTH_BYTES, 0), "little")
        end = LENGTH_BYTES + header_bytes
        if not 2 <= header_bytes <= min(LONGEST_HEADER_BYTES, size - LENGTH_BYTES):
            raise ValueError(f"its header cannot have {header_bytes:,} bytes")
        header = parse_json(os.pread(self._descriptor, header_bytes, LENGTH_BYTES))
        if not isinstance(header, dict):
            raise ValueError("its header is no JSON object")
        header.pop("__metadata__", None)
        found = {key: _HeaderEntry.model_validate(entry) for key, entry in header.items()}
        tensors = {}
        for key, entry in sorted(found.items(), key=lambda item: item[1].data_offsets):
            stored = StoredTensor(entry.dtype, entry.shape, end)
            if entry.data_offsets != (end - LENGTH_BYTES - header_bytes, stored.end - LENGTH_BYTES - header_bytes):
                raise ValueError(f"{key} lies at {entry.data_offsets}, where it does not fit")
            tensors[key], end = stored, stored.end
        if end != size:
            raise ValueError(f"its tensors end at byte {end:,}, the file at {size:,}")
        return tensors

    def read(self, key: str, box: Box, target: Tensor) -> int:
        """Copy a box of the tensor `key` into `target`, of the same shape and type, on the CPU.

        Returns how many bytes were read for it. Raises OSError, and CheckpointError where the file ends too early.
        """
        stored = self.tensors[key]
        assert target.dtype == DTYPES[stored.dtype] and tuple(target.shape) == box.shape
        if target.is_contiguous():  # a system call fills one stretch of memory
            return self._read_dense(stored, box, target)
        # Rows that go to separate places come through memory of their own, some at a time.
        rows = max(1, SCRATCH_BYTES // max(1, prod(box.shape[1:]) * target.itemsize))
        count = 0
        for first in range(0, box.shape[0], rows):
            part = target[first : first + rows]
            dense = torch.from_numpy(self._scratch.take("rows", part.nbytes)).view(part.dtype).view(part.shape)
            offsets = (box.offsets[0] + first, *box.offsets[1:])
            count += self._read_dense(stored, Box(offsets, tuple(part.shape)), dense)
            part.copy_(dense)
        return count

    def _read_dense(self, stored: StoredTensor, box: Box, target: Tensor) -> int:
        """Read a box into contiguous memory: runs of bytes at equal distances, in one group or several."""
        data = target.reshape(-1).view(torch.uint8).numpy()
        if not len(data):
            return 0
        strides = [prod(stored.shape[dim + 1 :]) * target.itemsize for dim in range(len(stored.shape))]
        start = stored.start + sum(offset * stride for offset, stride in zip(box.offsets, strides, strict=True))
        # The last dimension that is cut: what lies behind it is whole, so what is taken of it is one run.
        cut = max((dim for dim, size in enumerate(box.shape) if size != stored.shape[dim]), default=0)
        if cut == 0:
            return self._read_run(data.data, start)
        groups = data.reshape(prod(box.shape[: cut - 1]), box.shape[cut - 1], -1)
        indices = product(*map(range, box.shape[: cut - 1]))
        count = 0
        for group, index in zip(groups, indices, strict=True):
            place = start + sum(number * stride for number, stride in zip(index, strides, strict=False))
            count += self._read_group(group, place, strides[cut - 1])
        return count

    def _read_group(self, target: np.ndarray, start: int, stride: int) -> int:
        """Read runs of bytes, as many and as long as `target` [runs, bytes] has, `stride` apart in the file."""
        run = target.shape[1]
        apart = stride - run >= PAGE_BYTES  # where less lies between two runs, reading them apart spares nothing
        read = self._read_apart if apart else self._read_over_gaps
        at_once = max(1, SCRATCH_BYTES // (run if apart else stride))
        return sum(
            read(target[first : first + at_once], start + first * stride, stride)
            for first in range(0, len(target), at_once)
        )

    def _read_apart(self, target: np.ndarray, start: int, stride: int) -> int:
        run = target.shape[1]
        places = range(start, start + len(target) * stride, stride)
        for place in places:
            _advise(self._descriptor, place, run, WILL_NEED)
        memory = target.reshape(-1).data
        return sum(
            self._read_run(memory[number * run : (number + 1) * run], place) for number, place in enumerate(places)
        )

    def _read_over_gaps(self, target: np.ndarray, start: int, stride: int) -> int:
        span = (len(target) - 1) * stride + target.shape[1]
        covered = self._scratch.take("gaps", span)
        count = self._read_run(covered.data, start)
        target[:] = as_strided(covered, target.shape, (stride, 1))
        return count

    def _read_run(self, target: memoryview, start: int) -> int:
        """Fill memory from one place on: the system may give fewer bytes at a time than it was asked for."""
        size = len(target)
        if size > SCRATCH_BYTES:  # the disk goes on while a part is copied
            _advise(self._descriptor, start, size, WILL_NEED)
        while target:
            count = os.preadv(self._descriptor, [target[:SCRATCH_BYTES]], start)
            if count == 0:
                raise CheckpointError(
                    f"{self.path}: ends at byte {start:,}, inside a tensor. It was changed meanwhile."
                )
            target, start = target[count:], start + count
        return size


def _advise(descriptor: int, start: int, length: int, advice: int) -> None:
    if hasattr(os, "posix_fadvise"):  # not on every platform
        os.posix_fadvise(descriptor, start, length, advice)
