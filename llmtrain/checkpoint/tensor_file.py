"""Writing one safetensors file from memory, hashed in the same pass.

The layout is that of the safetensors library (https://github.com/huggingface/safetensors, "Format"): eight bytes with
the header's length, little-endian; a JSON header that gives each tensor's dtype, shape and byte range; the data without
holes. The stock library reads it. Its own writer is not used because the manifest needs the file's hash: hashing while
writing costs no second pass over the file.
"""

import hashlib
import json
import os
import queue
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""The names that safetensors gives to the types that a checkpoint may hold."""

DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}

LENGTH_BYTES = 8
PAGE_BYTES = 4096
"""The least that a disk reads."""

CHUNK_BYTES = 8 << 20
CHUNKS_AHEAD = 4
"""Chunks that may wait for the hash; they keep copies of tensors that are not contiguous, or on a GPU, in memory."""

DISK_BYTES = 32 << 20
"""The disk is given this much at a time while the rest is written and hashed: it would begin at the end by itself."""


@dataclass(frozen=True)
class WrittenFile:
    """Size and hash of a file, for the manifest."""

    size_bytes: int
    sha256: str


def tensor_file_header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Length and header, padded with spaces so that the data starts with a page: rows of whole pages are read apart
    without parts of others.

    The data follows in the order of `in_file_order`.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for key in in_file_order(tensors):
        tensor = tensors[key]
        begin, end = end, end + tensor.nbytes
        header[key] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + LENGTH_BYTES) % PAGE_BYTES)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


def in_file_order(tensors: Mapping[str, Tensor]) -> list[str]:
    """Keys by falling size of the type, so that every tensor is aligned to its own type."""
    return sorted(tensors, key=lambda key: -tensors[key].element_size())


def iter_chunks(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Iterator[memoryview]:
    """The bytes of the file in order, as views of the tensors' own memory where that is contiguous and on the CPU."""
    yield memoryview(tensor_file_header(tensors, metadata))
    for key in in_file_order(tensors):
        # The host waits for a device here, one tensor at a time; with async_save all of them are copies on the CPU.
        flat = tensors[key].detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        data = flat.numpy().data
        for start in range(0, len(data), CHUNK_BYTES):
            yield data[start : start + CHUNK_BYTES]


def write_tensor_file(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> WrittenFile:
    """Write a new safetensors file and return its size and hash once it is on the disk.

    The tensors must not change meanwhile. Raises OSError (a full disk, a missing folder, an existing file) and
    KeyError for a dtype that is not in DTYPE_NAMES.
    """
    digest = hashlib.sha256()
    chunks: queue.Queue[memoryview | None] = queue.Queue(CHUNKS_AHEAD)

    def hash_chunks() -> None:
        while (chunk := chunks.get()) is not None:
            digest.update(chunk)

    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    # A thread hashes while this one writes: both release the interpreter's lock.
    thread = threading.Thread(target=hash_chunks, name="checkpoint-hash", daemon=True)
    thread.start()
    try:
        size = given = 0
        for chunk in iter_chunks(tensors, metadata):
            chunks.put(chunk)
            write_all(descriptor, chunk)
            size += len(chunk)
            if size - given >= DISK_BYTES:
                # Linux starts the writing of what it is told to forget, and forgets only what is on the disk.
                if hasattr(os, "posix_fadvise"):  # not on every platform
                    os.posix_fadvise(descriptor, given, size - given, os.POSIX_FADV_DONTNEED)
                given = size
        # The hash still has chunks to read: the disk works through the same time.
        os.fsync(descriptor)
    finally:
        chunks.put(None)
        thread.join()
        os.close(descriptor)
    return WrittenFile(size, digest.hexdigest())


def write_all(descriptor: int, data: memoryview) -> None:
    """Write every byte: the system may take fewer than it was given."""
    while data:
        data = data[os.write(descriptor, data) :]
