"""The memory of positions that were decoded before, one cache per layer.

Shape suffixes: S new positions, T all positions, B batch, N heads, D size of one head.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from llmtrain.config.model import ModelConfig
from llmtrain.models.attention.linear import LinearState


class KeyValueCache:
    """Keys and values of the positions seen so far, [T, B, N, D], with room for `max_seq_len` positions."""

    def __init__(self, max_seq_len: int) -> None:
        self.max_seq_len = max_seq_len
        self.length = 0
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def extend(self, k_SBND: Tensor, v_SBND: Tensor) -> tuple[Tensor, Tensor]:
        """Append and return everything seen so far."""
        if self.keys is None or self.values is None:
            # Room for all at once: growing would copy everything at each position. Shapes are known with the first
            # keys.
            room = (self.max_seq_len, *k_SBND.shape[1:])
            self.keys, self.values = k_SBND.new_empty(room), v_SBND.new_empty(room)
        end = self.length + k_SBND.shape[0]
        self.keys[self.length : end] = k_SBND
        self.values[self.length : end] = v_SBND
        self.length = end
        return self.keys[:end], self.values[:end]


@dataclass
class StateCache:
    """Linear attention's sums: of the same size however long the sequence gets."""

    state: LinearState | None = None


class MemoryCache:
    """Cross-attention's keys and values: computed from the memory once."""

    def __init__(self) -> None:
        self.pair: tuple[Tensor, Tensor] | None = None

    def kept(self, compute: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """The result of the first `compute`."""
        if self.pair is None:
            self.pair = compute()
        return self.pair


LayerCache = KeyValueCache | StateCache | MemoryCache


def build_cache(config: ModelConfig, max_seq_len: int) -> KeyValueCache | StateCache:
    """The cache of one self-attention; a MemoryCache is cross-attention's."""
    return StateCache() if config.attention.kind == "linear" else KeyValueCache(max_seq_len)
