"""Token ids in the files of others: .npy members of WebDataset tars, and Megatron's indexed data sets.

Both are read where they are. Only what says where the ids lie is parsed here, within bounds, and never unpickled.
"""

import io
import struct
from pathlib import Path

import numpy as np
from numpy.lib import format as npy_format
from numpy.typing import NDArray

from data_pipelines.tar_members import iter_members
from llmtrain.data.storage.shard_file import TAR_BLOCK_BYTES
from llmtrain.errors import DataError
from llmtrain.files import open_regular

NPY_SUFFIX = ".npy"

MEGATRON_SUFFIXES = (".bin", ".idx")
_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
"""Magic, version, code of the type, sequences, and bounds of documents (megatron.core.datasets.indexed_dataset)."""
_CODES = {4: "uint32", 5: "uint64", 8: "uint16"}
"""Codes of its types: int32, int64 and uint16. Ids are not negative, so that signed ones have the same bits."""

_TYPES = {"<u2": "uint16", "<i2": "uint16", "<u4": "uint32", "<i4": "uint32", "<u8": "uint64", "<i8": "uint64"}


def scan_arrays(path: Path) -> tuple[NDArray[np.uint64], str | None]:
    """Offset and size [documents, 2] of the ids of each `.npy` member of a tar, and the type that they all have; None
    where there is no such member.

    Raises DataError where the archive is damaged, or a member is not a plain list of whole numbers.
    """
    places: list[tuple[int, int]] = []
    types: dict[str, str] = {}
    with open_regular(path) as file:
        for member in iter_members(path, NPY_SUFFIX):
            file.seek(member.offset_data)
            begin, dtype = _array_begin(path, member.name, file.read(min(member.size, TAR_BLOCK_BYTES)), member.size)
            types.setdefault(dtype, member.name)
            places.append((member.offset_data + begin, member.size - begin))
    if len(types) > 1:
        said = " and ".join(f"{dtype} in {name}" for dtype, name in list(types.items())[:2])
        raise DataError(f"{path}: ids are of several types, {said}. Write all of them as one.")
    return np.array(places, np.uint64).reshape(-1, 2), next(iter(types), None)


def _array_begin(path: Path, name: str, head: bytes, size_bytes: int) -> tuple[int, str]:
    """Where the ids of an array begin in its file, and their type; `head` is the file's first block."""
    file = io.BytesIO(head)
    try:
        version = npy_format.read_magic(file)
        read = {(1, 0): npy_format.read_array_header_1_0, (2, 0): npy_format.read_array_header_2_0}[version]
        shape, _, dtype = read(file)
    except (ValueError, KeyError, EOFError, SyntaxError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{path}: member {name} is not a .npy file of token ids ({reason}). Write it again.") from None
    found = _TYPES.get(dtype.str)
    if found is None or len(shape) != 1:
        what = f"{len(shape)} dimensions of {dtype.str}"
        raise DataError(
            f"{path}: member {name} has {what}, and a document is one dimension of little-endian ids: "
            f"{', '.join(_TYPES)}. Write it again, as a list of whole numbers."
        )
    expected = file.tell() + shape[0] * dtype.itemsize
    if expected != size_bytes:
        raise DataError(f"{path}: member {name}: expected {expected} bytes, actual {size_bytes}. Write it again.")
    return file.tell(), found


def megatron_files(folder: Path) -> list[Path]:
    """The files with ids of the indexed data sets in a folder: each has its index beside it."""
    found = sorted(folder.glob("*.bin"))
    return [path for path in found if path.with_suffix(".idx").is_file()]


def scan_indexed(path: Path) -> tuple[NDArray[np.uint64], str]:
    """Offset and size [documents, 2] of the documents in a `.bin` file, as the `.idx` beside it says, and their type.

    A document may be several sequences, which stand one behind another. Raises DataError where the two files are not
    what Megatron writes, or do not fit each other.
    """
    index = path.with_suffix(".idx")
    with open_regular(index) as file:
        header = file.read(_HEADER.size)
        size_bytes = file.seek(0, io.SEEK_END)
    if len(header) < _HEADER.size or not header.startswith(_MAGIC):
        raise DataError(f"{index}: is no index of a Megatron data set: it does not begin with {_MAGIC[:7].decode()}.")
    _, version, code, sequences, bounds = _HEADER.unpack(header)
    least = _HEADER.size + 12 * sequences + 8 * bounds
    # With modes, a byte for each sequence follows.
    if version != 1 or size_bytes not in (least, least + sequences):
        raise DataError(
            f"{index}: version {version} with {sequences:,} sequences and {bounds:,} bounds of documents: expected "
            f"{least:,} bytes of version 1, actual {size_bytes:,}. Copy the file again."
        )
    if code not in _CODES:
        raise DataError(f"{index}: its type has the code {code}. Token ids are int32 (4), int64 (5) or uint16 (8).")
    if not sequences:
        raise DataError(f"{index}: has no sequences. Leave the two files out.")
    content = np.memmap(index, np.uint8, mode="r", offset=_HEADER.size)
    lengths = content[: 4 * sequences].view("<i4").astype(np.int64)
    begins = content[4 * sequences : 12 * sequences].view("<i8")
    documents = content[12 * sequences : 12 * sequences + 8 * bounds].view("<i8")
    itemsize = int(_CODES[code][4:]) // 8
    before = np.concatenate(([0], np.cumsum(lengths)))
    with open_regular(path) as file:
        stored = file.seek(0, io.SEEK_END)
    fits = (
        (lengths >= 0).all()
        and np.array_equal(begins, before[:-1] * itemsize)
        and (len(documents) == 0 or (documents[0] == 0 and documents[-1] == sequences))
        and (np.diff(documents) >= 0).all()
        and stored == before[-1] * itemsize
    )
    if not fits:
        raise DataError(
            f"{index}: its places are not those of {stored:,} bytes of {path.name}, one sequence behind another. Copy "
            "both files again."
        )
    ends = before[documents] * itemsize
    return np.stack((ends[:-1], np.diff(ends)), axis=1).astype(np.uint64), _CODES[code]
