"""What the members of other people's tars hold: how wide their ids are, and whether documents bring their own end."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llmtrain.data.storage.manifest import DTYPES, dtype_name
from llmtrain.errors import ConfigError, DataError

Payloads = NDArray[np.uint64]
"""Offset and size [documents, 2] of the members of a tar."""


def stored_dtype(shards: Sequence[tuple[Path, Payloads]], vocab_size: int, asked: str | None) -> str:
    """The type of the ids in a folder: the one asked for, or the narrowest for the vocabulary.

    Wider ids than that can be read as narrow ones, with a zero behind each. Raises ConfigError where that is what they
    look like and nobody has said so, DataError where no type fits.
    """
    usual = dtype_name(vocab_size)
    if asked is not None:
        if np.iinfo(DTYPES[asked]).max + 1 < vocab_size:
            raise ConfigError(
                f"--dtype {asked}: does not hold all ids of a vocabulary of {vocab_size:,}. Write the ids as {usual}."
            )
        return asked
    folder = shards[0][0].parent
    width = _width(shards)
    if width == 8:
        raise DataError(
            f"{folder}: the ids look like 64-bit ones: the last four of eight bytes are 0. Write them as {usual}, or "
            f"say --dtype {usual} if they are just that."
        )
    if width == 4 and usual == "uint16":
        raise ConfigError(
            f"{folder}: the ids look like uint32, though a vocabulary of {vocab_size:,} needs uint16 only: every "
            "second pair of bytes is 0. Say which they are: --dtype uint32, or --dtype uint16 if every second token is "
            "id 0."
        )
    return usual


def _width(shards: Sequence[tuple[Path, Payloads]]) -> int | None:
    """8 or 4 where all documents are ids of so many bytes whose upper halves are 0; None where they are not."""
    used = np.zeros(4, bool)
    sizes = np.concatenate([payloads[:, 1] for _, payloads in shards])
    for path, payloads in shards:
        content = np.memmap(path, np.uint8, mode="r")
        for offset, size in payloads.tolist():
            pairs = content[offset : offset + size // 2 * 2].view("<u2")
            used |= [bool(pairs[place::4].any()) for place in range(4)]
        if (sizes % 4).any() or (used[1] and used[3]):
            return None
    if not used[0]:
        return None
    if not (sizes % 8).any() and not used[2] and not used[3]:
        return 8
    return None if used[1] or used[3] else 4


def without_ends(path: Path, payloads: Payloads, dtype: np.dtype, eos_id: int) -> Payloads:
    """The same places where documents that bring their own end of sequence stop before it.

    The stream puts one behind every document: they would have two.
    """
    content = np.memmap(path, np.uint8, mode="r")
    trimmed = payloads.copy()
    for number, (offset, size) in enumerate(payloads.tolist()):
        last = content[offset + size - dtype.itemsize : offset + size] if size >= dtype.itemsize else content[:0]
        if len(last) and int(last.view(dtype)[0]) == eos_id:
            trimmed[number, 1] -= np.uint64(dtype.itemsize)
    return trimmed
