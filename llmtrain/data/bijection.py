"""Keyed permutations: of many elements, computed for each as it is asked for, and of few, as a whole."""

import numpy as np
from numpy.typing import NDArray

from llmtrain.values.keyed_hash import MASK_64, mixed, mixed_array

_ROUNDS = 6
_FEWEST_BITS = 6
"""Halves of fewer than three bits mix too little; small sizes walk through a larger domain instead."""


_BLOCK = 256
"""Images that are computed together."""


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
        self._block, self._images = -1, list[int]()
        self._last = -2

    def __call__(self, index: int) -> int:
        """The image of one element. Those who ask for one behind the other are answered from a block of them."""
        if index // _BLOCK == self._block:
            return self._images[index % _BLOCK]
        if index != self._last + 1:
            self._last = index
            return self._image(index)
        self._block = index // _BLOCK
        first = self._block * _BLOCK
        self._images = self._block_of_images(np.arange(first, min(first + _BLOCK, self.size), dtype=np.uint64)).tolist()
        self._last = first + _BLOCK - 1
        return self._images[index % _BLOCK]

    def _block_of_images(self, indices: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """The same as `_image` for many."""
        left_bits, left_mask, right_mask = map(np.uint64, (self._left_bits, self._left_mask, self._right_mask))
        left, right = indices & left_mask, indices >> left_bits
        for number, key in enumerate(np.array(self._keys, np.uint64)):
            if number % 2 == 0:
                left ^= mixed_array(right + key) & left_mask
            else:
                right ^= mixed_array(left + key) & right_mask
        images = left | right << left_bits
        outside = np.flatnonzero(images >= np.uint64(self.size))
        if len(outside):
            images[outside] = self._block_of_images(images[outside])
        return images

    def _image(self, index: int) -> int:
        left_bits, left_mask, right_mask = self._left_bits, self._left_mask, self._right_mask
        while True:
            left, right = index & left_mask, index >> left_bits
            for even_key, odd_key in zip(self._keys[::2], self._keys[1::2], strict=True):
                left ^= mixed((right + even_key) & MASK_64) & left_mask
                right ^= mixed((left + odd_key) & MASK_64) & right_mask
            index = left | right << left_bits
            if index < self.size:
                return index


def keyed_permutation(size: int, key: bytes) -> NDArray[np.int64]:
    """A permutation of range(size): its elements sorted by a keyed hash of each."""
    start = np.uint64(int.from_bytes(key[:8], "little"))
    hashes = mixed_array(
        mixed_array(np.arange(size, dtype=np.uint64) + start) ^ np.uint64(int.from_bytes(key[8:16], "little"))
    )
    return np.argsort(hashes, kind="stable")
