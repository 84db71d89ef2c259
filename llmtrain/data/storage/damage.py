"""What is wrong with a file of a data set: the error that says so, and where in a shard the damage lies."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llmtrain.errors import DataError
from llmtrain.files import open_regular

TAR_BLOCK_BYTES = 512
_CHECKSUM = slice(148, 156)


class DamagedFileError(DataError):
    """A file is missing, or is not what the manifest says: a fact that every rank finds alike.

    `actual` is what was found instead, in few words; `reason` is missing, size, sha256 or index. A file that cannot be
    read for the moment is none of these and raises DataError.
    """

    def __init__(self, message: str, reason: str, actual: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.actual = actual


def place_of_cut(payloads: NDArray[np.int64], size_bytes: int) -> str:
    """What byte `size_bytes` of a whole shard would be, from the [documents, 2] offsets and sizes of its payloads."""
    ends = payloads[:, 0] + payloads[:, 1]
    number = int(np.searchsorted(ends, size_bytes, side="right"))  # the first document that is not there whole
    if number == len(payloads):
        return f"byte {size_bytes} lies behind the last document"
    begin, end = int(payloads[number, 0]), int(ends[number])
    if size_bytes > begin:
        return f"byte {size_bytes} lies inside document {number} (bytes {begin} to {end})"
    if size_bytes > begin - TAR_BLOCK_BYTES:
        return f"byte {size_bytes} lies inside the header of document {number}"
    return f"byte {size_bytes} lies before the header of document {number}"


def place_of_flip(path: Path, payloads: NDArray[np.int64]) -> str:
    """The first header of a shard whose own checksum is wrong, or that none is."""
    with open_regular(path) as file:
        for number, (offset, size) in enumerate(payloads.tolist()):
            begin = offset - TAR_BLOCK_BYTES
            file.seek(max(0, begin))
            header = file.read(TAR_BLOCK_BYTES)
            if begin < 0 or not _is_header(header, size):
                return f"the header of document {number} at byte {begin} is damaged"
    return "every header is whole, so the damage lies in the documents or between them"


def _is_header(block: bytes, size: int) -> bool:
    """Whether a block is a tar header with a right checksum, of a member with so many bytes."""
    written = block[_CHECKSUM].strip(b" \0")
    total = sum(block) - sum(block[_CHECKSUM]) + 8 * ord(" ")
    try:
        member_size = int(block[124:136].strip(b" \0"), 8)
        # A document may stop one id before its member does: before an end of sequence of its own.
        return int(written, 8) == total and member_size in (size, size + 2, size + 4)
    except ValueError:  # no octal numbers; sizes from 8 GiB on are written otherwise, and no document has them
        return False
