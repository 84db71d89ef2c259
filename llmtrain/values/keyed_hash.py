"""Keys that depend on what they are for, and the mixing of 64 bits: what everything that is drawn follows from. Pure.

All of it is pinned: another value here gives other weights, another order of samples, other masks.
"""

import hashlib

import numpy as np
from numpy.typing import NDArray

MASK_64 = (1 << 64) - 1
FIRST_FACTOR, SECOND_FACTOR = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
"""Factors of SplitMix64's finalizer (Steele, Lea and Flood 2014)."""


def derived_key(*parts: int | str) -> int:
    """A signed 64-bit key that depends on every part and on their order."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def wide_key(purpose: str, *numbers: int) -> bytes:
    """A key of 64 bytes that depends on a purpose and on numbers such as seed, source and epoch."""
    return hashlib.blake2b("|".join((purpose, *map(str, numbers))).encode(), digest_size=64).digest()


def signed(value: int) -> int:
    """The int64 with the same bits."""
    return value - (1 << 64) if value >> 63 else value


def mixed(value: int) -> int:
    """The output of SplitMix64 on a whole number of 64 bits."""
    value = ((value ^ (value >> 30)) * FIRST_FACTOR) & MASK_64
    value = ((value ^ (value >> 27)) * SECOND_FACTOR) & MASK_64
    return value ^ (value >> 31)


def mixed_array(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The same for an array; numpy's unsigned integers wrap as the formula wants."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(FIRST_FACTOR)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(SECOND_FACTOR)
    return values ^ (values >> np.uint64(31))
