"""The order of samples: a pure function from a sample's number to its place, found without a list of all samples.

Shards are permuted anew in every epoch; inside each group of consecutive permuted shards, windows are shuffled by a
keyed bijection. So reading stays within a few shards at a time, and any position is found at once.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from llmtrain.values.keyed_hash import MASK_64, mixed, mixed_array, wide_key

_ROUNDS = 6
_FEWEST_BITS = 6
"""Halves of fewer than three bits mix too little; small sizes walk through a larger domain instead."""


class KeyedBijection:
    """A keyed permutation of range(size) that is computed per element.

    A Feistel network over the smallest sufficient number of bits, whose halves may differ by one bit; results outside
    of the range are put through the network again until one lies inside (cycle walking: Black and Rogaway 2002).
    """

    def __init__(self, size: int, key: bytes) -> None:
        """`size` is at least 1, `key` has 64 bytes."""
        bits = max(_FEWEST_BITS, (size - 1).bit_length())
        self.size = size
        self._left_bits = bits // 2
        self._left_mask = (1 << self._left_bits) - 1
        self._right_mask = (1 << (bits - self._left_bits)) - 1
        self._keys = [int.from_bytes(key[8 * i : 8 * i + 8], "little") for i in range(_ROUNDS)]

    def __call__(self, index: int) -> int:
        """The image of one element."""
        left_bits, left_mask, right_mask = self._left_bits, self._left_mask, self._right_mask
        while True:
            left, right = index & left_mask, index >> left_bits
            for even_key, odd_key in zip(self._keys[::2], self._keys[1::2], strict=True):
                left ^= mixed((right + even_key) & MASK_64) & left_mask
                right ^= mixed((left + odd_key) & MASK_64) & right_mask
            index = left | right << left_bits
            if index < self.size:
                return index

    def images(self, indices: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """The images of many elements at once; an array of the same shape."""
        result = indices.astype(np.uint64).ravel()
        outside = np.arange(result.size)
        left_bits = np.uint64(self._left_bits)
        left_mask, right_mask = np.uint64(self._left_mask), np.uint64(self._right_mask)
        while outside.size:
            left, right = result[outside] & left_mask, result[outside] >> left_bits
            for even_key, odd_key in zip(self._keys[::2], self._keys[1::2], strict=True):
                left = left ^ (mixed_array(right + np.uint64(even_key)) & left_mask)
                right = right ^ (mixed_array(left + np.uint64(odd_key)) & right_mask)
            walked = left | right << left_bits
            result[outside] = walked
            outside = outside[walked >= np.uint64(self.size)]
        return result.reshape(indices.shape)


def keyed_permutation(size: int, key: bytes) -> NDArray[np.int64]:
    """A permutation of range(size): its elements sorted by a keyed hash of each."""
    start = np.uint64(int.from_bytes(key[:8], "little"))
    hashes = mixed_array(
        mixed_array(np.arange(size, dtype=np.uint64) + start) ^ np.uint64(int.from_bytes(key[8:16], "little"))
    )
    return np.argsort(hashes, kind="stable")


@dataclass(frozen=True)
class Place:
    """Where a sample lies: window `window` of shard `shard`, in pass `epoch` over the source."""

    epoch: int
    shard: int
    window: int


@dataclass(frozen=True)
class Part:
    """Tokens [begin, end) of the stream of shard `shard`."""

    shard: int
    begin: int
    end: int


@dataclass(frozen=True)
class _Epoch:
    """The shards of one epoch in their order, and how many windows lie before each of them."""

    shards: list[int]
    windows_before: list[int]


class SampleOrder:
    """The order of the windows of one source that each lie in one shard, whose last tokens may be in none.

    Sample n belongs to epoch n // N, where N is the number of windows.
    """

    def __init__(self, windows: Sequence[int], seq_len: int, seed: int, source: int, group_size: int) -> None:
        """`windows` counts the windows of each shard; they are shuffled within groups of `group_size` shards."""
        self.num_windows = self.whole_windows = sum(windows)
        assert self.num_windows > 0
        self._seq_len = seq_len
        self._windows = np.asarray(windows, np.int64)
        self._seed = seed
        self._source = source
        self._group_size = group_size
        # Neighbouring samples share their epoch and group; two of each, because a boundary may lie between them.
        self._epoch = lru_cache(maxsize=2)(self._build_epoch)
        self._bijection = lru_cache(maxsize=2)(self._build_bijection)

    def place(self, number: int) -> Place:
        """The place of sample `number` (from 0, without end)."""
        epoch, position = divmod(number, self.num_windows)
        order = self._epoch(epoch)
        before = order.windows_before
        # The last shard that begins at or before the position: shards without windows are passed over.
        group = (bisect_right(before, position) - 1) // self._group_size
        begin = before[group * self._group_size]
        end = before[min((group + 1) * self._group_size, len(order.shards))]
        shuffled = begin + self._bijection(epoch, group, end - begin)(position - begin)
        rank = bisect_right(before, shuffled) - 1
        return Place(epoch, order.shards[rank], shuffled - before[rank])

    def parts(self, place: Place) -> list[Part]:
        """The tokens of a sample: of one shard, `seq_len` and one that the next window begins with."""
        begin = place.window * self._seq_len
        return [Part(place.shard, begin, begin + self._seq_len + 1)]

    def coming_shards(self, number: int) -> tuple[list[int], int]:
        """The shards of the group that follows, and the sample from which on the answer is another one.

        There are none in the first half of a group: who reads a few samples only needs none of them.
        """
        epoch, position = divmod(number, self.num_windows)
        order = self._epoch(epoch)
        before, size = order.windows_before, self._group_size
        first = (bisect_right(before, position) - 1) // size * size
        begin, end = before[first], before[min(first + size, len(order.shards))]
        middle = (begin + end) // 2
        if position < middle:
            return [], epoch * self.num_windows + middle
        if end < self.num_windows:
            following = order.shards[first + size : first + 2 * size]
        else:
            following = self._epoch(epoch + 1).shards[:size]
        return self._with_windows(following), epoch * self.num_windows + end

    def windows_of(self, shard: int) -> int:
        """How many samples of an epoch need a shard."""
        return int(self._windows[shard])

    def most_shards(self) -> int:
        """How many shards one window needs."""
        return 1

    def _with_windows(self, shards: list[int]) -> list[int]:
        return [shard for shard in shards if self._windows[shard]]

    def _build_epoch(self, epoch: int) -> _Epoch:
        shards = keyed_permutation(len(self._windows), wide_key("shards", self._seed, self._source, epoch))
        before = np.concatenate(([0], np.cumsum(self._windows[shards])))
        return _Epoch(shards.tolist(), before.tolist())

    def _build_bijection(self, epoch: int, group: int, size: int) -> KeyedBijection:
        return KeyedBijection(size, wide_key("windows", self._seed, self._source, epoch, group))
