"""The blocks of a cache: which are free, which belong to whom, and which hold the beginning of some prompt. Pure."""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from llmtrain.models.attention.rows import SPARE

Digest = bytes
"""Of all tokens of a sequence up to the end of a block."""


def next_digest(before: Digest, tokens: Sequence[int]) -> Digest:
    """Of a block with these tokens, by that of the block before it (empty of the first one)."""
    return hashlib.sha256(before + np.asarray(tokens, dtype=np.int64).tobytes()).digest()


class BlockPool:
    """`size` blocks beside the spare one. A block whose last owner has left stays readable under its digest until it is
    needed for something else, the one that was left first first."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._free = list(range(size, SPARE, -1))
        self._owners = dict[int, int]()
        self._by_digest = dict[Digest, int]()
        self._digest_of = dict[int, Digest]()
        self._left: OrderedDict[int, None] = OrderedDict()

    @property
    def available(self) -> int:
        """Blocks that nobody owns."""
        return len(self._free) + len(self._left)

    def take(self) -> int | None:
        """A block for one owner; None where all are owned."""
        if self._free:
            block = self._free.pop()
        elif self._left:
            block, _ = self._left.popitem(last=False)
            del self._by_digest[self._digest_of.pop(block)]
        else:
            return None
        self._owners[block] = 1
        return block

    def find(self, digest: Digest) -> int | None:
        """A block with this content, without owning it."""
        return self._by_digest.get(digest)

    def share(self, block: int) -> None:
        """Own a block that was found."""
        self._owners[block] = self._owners.get(block, 0) + 1
        self._left.pop(block, None)

    def name(self, block: int, digest: Digest) -> None:
        """Let others find an owned block, which is full now. Of two with one content the first is found."""
        if block not in self._digest_of and digest not in self._by_digest:
            self._by_digest[digest], self._digest_of[block] = block, digest

    def leave(self, blocks: Sequence[int]) -> None:
        """Give up blocks; the last ones of a sequence are the first that others may write over."""
        for block in reversed(blocks):
            self._owners[block] -= 1
            if self._owners[block]:
                continue
            del self._owners[block]
            if block in self._digest_of:
                self._left[block] = None
            else:
                self._free.append(block)
