"""The memory of positions that were decoded before: keys and values in blocks, sums in slots.

A sequence owns blocks of BLOCK positions, in any order (Kwon et al. 2023, section 4.1). Stores belong to a layer and
hold all sequences; a cache is the view of a store that one forward pass has: of one sequence with several new
positions, or of many with one each.

Shape suffixes: B rows, S new positions, K blocks of a row, T all positions, N heads, D size of one head, E = D + 1.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmtrain.models.attention.dense import DenseKeys, DenseSums
from llmtrain.models.attention.linear import LinearState, decode
from llmtrain.models.attention.rows import BLOCK, RowGroup, Rows, row_attention
from llmtrain.models.attention.scoring import Scoring, Visibility


class BlockStore:
    """Keys and values of one attention, [N, blocks, BLOCK, D] each. Heads come first: what is brought together of a
    row's blocks is then one piece of memory for each head."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.pair: tuple[Tensor, Tensor] | None = None

    def stored(self, like_ND: Tensor) -> tuple[Tensor, Tensor]:
        """The two tensors; shapes and type are known with the first keys."""
        if self.pair is None:
            heads, size = like_ND.shape
            # Zeros: what nobody sees is multiplied by 0, and may not be infinite.
            keys, values = (like_ND.new_zeros(heads, self.num_blocks, BLOCK, size) for _ in range(2))
            self.pair = keys, values
        return self.pair

    def write(self, blocks_S: Tensor, places_S: Tensor, k_SND: Tensor, v_SND: Tensor) -> None:
        for store, x_SND in zip(self.stored(k_SND[0]), (k_SND, v_SND), strict=True):
            store[:, blocks_S, places_S] = x_SND.transpose(0, 1)

    def gathered(self, blocks_BK: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of rows, [T, B, N, D] each."""
        assert self.pair is not None, "keys are written before they are read"
        rows, length = blocks_BK.shape
        shape = (-1, rows, length * BLOCK, self.pair[0].shape[-1])
        keys, values = (store.index_select(1, blocks_BK.flatten()).view(shape) for store in self.pair)
        return keys.permute(2, 1, 0, 3), values.permute(2, 1, 0, 3)


@dataclass(frozen=True, eq=False)
class ChunkCache:
    """The cache of one sequence whose next positions come several at a time: it has `length` of them before those."""

    store: BlockStore
    blocks_K: Tensor
    length: int

    def extend(self, k_SBND: Tensor, v_SBND: Tensor) -> tuple[Tensor, Tensor]:
        """Append and return everything seen so far, [T, 1, N, D]."""
        end = self.length + k_SBND.shape[0]
        places_S = torch.arange(self.length, end, device=k_SBND.device)
        self.store.write(self.blocks_K[places_S // BLOCK], places_S % BLOCK, k_SBND[:, 0], v_SBND[:, 0])
        keys, values = self.store.gathered(self.blocks_K[None])
        return keys[:end], values[:end]


@dataclass(frozen=True, eq=False)
class MemoryCache:
    """Cross-attention's cache of one sequence: keys and values of `length` positions of the encoder's output, which
    are made when the sequence `begins`."""

    store: BlockStore
    blocks_K: Tensor
    length: int
    begins: bool

    def kept(self, compute: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """What `compute` has returned when the sequence began, [T, 1, N, D]."""
        if self.begins:
            return ChunkCache(self.store, self.blocks_K, 0).extend(*compute())
        keys, values = self.store.gathered(self.blocks_K[None])
        return keys[: self.length], values[: self.length]


@dataclass(frozen=True, eq=False)
class RowCache:
    """The cache of many sequences with one new position each; `groups` bring their keys together."""

    store: BlockStore
    rows: Rows
    groups: Sequence[RowGroup]

    def append(self, k_1BND: Tensor, v_1BND: Tensor) -> None:
        self.store.write(self.rows.blocks_B, self.rows.places_B, k_1BND[0], v_1BND[0])

    def attended(self, q_1BND: Tensor, scoring_of: Callable[[Tensor, Tensor], Scoring]) -> Tensor:
        """[1, B, N, D]: each row's query over the keys of that row."""
        out = torch.empty_like(q_1BND)
        for group in self.groups:
            keys, values = self.store.gathered(group.blocks_BK)
            q = q_1BND if group.is_all else q_1BND[:, group.rows_B]
            attended = row_attention(q, keys, values, group, scoring_of(q, keys))
            if group.is_all:
                return attended
            out[:, group.rows_B] = attended
        return out


class StateStore:
    """The sums of linear attention, one for each slot: [slots, N, D, E]."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self.sums: Tensor | None = None


@dataclass(frozen=True, eq=False)
class RowStates:
    """Linear attention's memory of some rows; `begins` where they have seen nothing yet."""

    store: StateStore
    slots_B: Tensor
    begins: bool = False

    def attended(self, q_SBND: Tensor, k_SBND: Tensor, v_SBND: Tensor, visible: Visibility) -> Tensor:
        """[S, B, N, D], and the sums have the new positions."""
        sums = self.store.sums
        before = None if self.begins or sums is None else LinearState(sums[self.slots_B])
        out, state = decode(q_SBND, k_SBND, v_SBND, visible, before)
        if sums is None:
            sums = state.sums_BNDE.new_zeros(self.store.num_slots, *state.sums_BNDE.shape[1:])
            self.store.sums = sums
        sums[self.slots_B] = state.sums_BNDE
        return out


LayerCache = ChunkCache | MemoryCache | RowCache | RowStates | DenseKeys | DenseSums
