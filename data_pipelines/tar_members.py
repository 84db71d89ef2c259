"""The members of a tar, found by reading headers only, strictly: an archive that is cut or damaged is no shard."""

import os
import tarfile
from collections.abc import Iterator
from functools import partial
from io import BufferedReader
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llmtrain.data.storage.shard_file import TAR_BLOCK_BYTES
from llmtrain.errors import DataError
from llmtrain.files import open_regular

TOKEN_SUFFIX = ".bin"
_END_BLOCK_BYTES = _LONGEST_HEADER = 1 << 20


def scan_tar(path: Path) -> NDArray[np.uint64]:
    """Offset and size [documents, 2] of each `.bin` member of a tar. Raises DataError as `iter_members` does."""
    places = [(member.offset_data, member.size) for member in iter_members(path, TOKEN_SUFFIX)]
    return np.array(places, np.uint64).reshape(-1, 2)


def scan_pairs(path: Path, suffix: str) -> NDArray[np.uint64]:
    """Offset and size [documents, 4] of each `.bin` member of a tar, and of the member `suffix` that follows it.

    Raises DataError as `iter_members` does, and where a document has not both.
    """
    first, second = (list(iter_members(path, ending)) for ending in (TOKEN_SUFFIX, suffix))
    keys = [
        [member.name.removesuffix(end) for member in found] for found, end in ((first, TOKEN_SUFFIX), (second, suffix))
    ]
    if keys[0] != keys[1]:
        only = sorted(set(keys[0]) ^ set(keys[1])) or ["their order"]
        raise DataError(f"{path}: {only[0]}: a document has {TOKEN_SUFFIX} and {suffix}. Write the shard again.")
    places = [(a.offset_data, a.size, b.offset_data, b.size) for a, b in zip(first, second, strict=True)]
    return np.array(places, np.uint64).reshape(-1, 4)


def iter_members(path: Path, suffix: str) -> Iterator[tarfile.TarInfo]:
    """The members whose names end so, of which a document has one. Others are passed over unread.

    Raises DataError where the archive is cut or damaged anywhere: the usual readers take a damaged header for the end,
    and lose the rest without a word.
    """
    last_key = None
    try:
        with open_regular(path) as file, tarfile.open(fileobj=_HeaderFile(file.raw), mode="r:") as tar:
            while (member := tar.next()) is not None:
                # The library would keep every header in memory.
                tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue]  documented, but not in typeshed
                if not member.name.endswith(suffix):
                    continue
                if not member.isreg() or member.issparse():
                    raise DataError(f"{path}: member {member.name} is not a plain file. Write the shard again.")
                # As webdataset groups members: by the path up to the first dot of its last part.
                place, _, last = member.name.rpartition("/")
                key = f"{place}/{last.partition('.')[0]}"
                if key == last_key:
                    raise DataError(f"{path}: {key} has two {suffix} members; a document has one.")
                yield member
                last_key = key
            end = tar.offset
    except (tarfile.TarError, OSError, ValueError) as error:
        raise DataError(f"{path}: not a whole tar archive ({error}). Copy the file again.") from None
    _check_end(path, end)


class _HeaderFile(BufferedReader):
    """A tar of which headers alone are read. What one claims to be its own rest, a long name say, is bounded."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= _LONGEST_HEADER:
            raise tarfile.ReadError(f"a header at byte {self.tell()} claims {size} bytes of its own")
        return super().read(size)


def _check_end(path: Path, end: int) -> None:
    """An archive ends with two blocks of zeros, and nothing but zeros follows."""
    with open_regular(path) as file:
        # The reader stands behind the first block that it took for the end, or before it: both lie in the zeros.
        size_bytes = os.fstat(file.fileno()).st_size
        begin = file.seek(min(end, size_bytes))
        clean = not any(block.strip(b"\0") for block in iter(partial(file.read, _END_BLOCK_BYTES), b""))
    if not clean:
        raise DataError(
            f"{path}: expected the end of the archive at byte {end}, actual {size_bytes - begin} bytes follow that are "
            "no valid member: a header is damaged or cut. Copy the file again."
        )
    if size_bytes - begin < 2 * TAR_BLOCK_BYTES:
        raise DataError(
            f"{path}: expected {2 * TAR_BLOCK_BYTES} bytes of zeros at the end of the archive, actual "
            f"{size_bytes - begin}: it is cut short. Copy the file again."
        )
