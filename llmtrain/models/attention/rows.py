"""Decoding of many sequences at once, one new position of each, over keys that differ in number.

What is computed for a row depends on that row alone: rows go together where their tables of blocks are equally long,
and a table's length follows from the row's own number of positions.

Shape suffixes: B rows, K blocks of a row, T = K BLOCK positions of a row, N heads, D size of one head, G heads of
queries for one head of keys.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from llmtrain.models.attention.scoring import Scoring, repeated_kv
from llmtrain.models.positions import at_least_fp32

BLOCK = 32
"""Positions of a block."""

SPARE = 0
"""The block, and the slot, of rows that only fill a batch: nobody else has it."""


def table_length(num_positions: int) -> int:
    """Blocks in the table of a row with so many positions: less than half more than it needs, so that rows whose
    lengths are near each other go together."""
    needed = max(1, -(-num_positions // BLOCK))
    power = 1 << (needed - 1).bit_length()  # the next power of two, or three quarters of it
    return power * 3 // 4 if power >= 4 and needed <= power * 3 // 4 else power


@dataclass(frozen=True, eq=False)
class RowGroup:
    """Rows with tables of one length: their numbers in the batch, their blocks, and how many keys each sees."""

    rows_B: Tensor
    blocks_BK: Tensor
    ends_B: Tensor
    is_all: bool
    """True where these are all rows, in their order."""

    def mask(self, num_keys: int, scoring: Scoring) -> Tensor:
        """[B, T], True where the query at the row's end sees the key. Made once, for all layers of one pattern."""
        made, key = scoring.visible.made, (id(self), scoring.pattern, num_keys)
        if key not in made:
            t_T = torch.arange(num_keys, device=self.ends_B.device)
            seen_BT = t_T < self.ends_B[:, None]
            rule = scoring.pattern.rule(num_keys, self.ends_B.device) if scoring.visible.causal else None
            made[key] = seen_BT if rule is None else seen_BT & rule(self.ends_B[:, None] - 1, t_T)
        return made[key]


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows of one step: the slot of each row's state, and the block, and the place in it, of its new key."""

    slots_B: Tensor
    blocks_B: Tensor
    places_B: Tensor


def row_attention(q_1BND: Tensor, k_TBND: Tensor, v_TBND: Tensor, group: RowGroup, scoring: Scoring) -> Tensor:
    """[1, B, N, D]: of each row one query, the last of the positions that its row has; see `Scoring`."""
    num_keys, heads = k_TBND.shape[0], q_1BND.shape[2]
    mask_B11T = group.mask(num_keys, scoring)[:, None, None]
    if scoring.by_distance_NR is None and scoring.softcap is None and scoring.sinks_N is None:
        q, k, v = (x.permute(1, 2, 0, 3) for x in (q_1BND, repeated_kv(k_TBND, heads), repeated_kv(v_TBND, heads)))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask_B11T, scale=scoring.scale).permute(2, 0, 1, 3)
    groups = (k_TBND.shape[2], heads // k_TBND.shape[2])  # heads of queries by their heads of keys
    q_BNGD = q_1BND[0].unflatten(1, groups)
    scores = at_least_fp32(q_BNGD @ k_TBND.permute(1, 2, 3, 0)) * scoring.scale
    if scoring.softcap is not None:
        scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
    if scoring.by_distance_NR is not None:
        # Column r is for distance r - (T - 1), and a row's query stands at its own end.
        column_BT = torch.arange(num_keys, device=q_1BND.device) + num_keys - group.ends_B[:, None]
        by_distance_BNT = scoring.by_distance_NR[:, column_BT.clamp(max=num_keys - 1)].transpose(0, 1)
        scores = scores + by_distance_BNT.unflatten(1, groups)
    scores = scores.masked_fill(~mask_B11T, float("-inf"))
    if scoring.sinks_N is not None:
        sinks = scoring.sinks_N.view(1, *groups, 1).expand(*scores.shape[:3], 1)
        weights = torch.cat((scores, sinks), -1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    return (weights.to(v_TBND.dtype) @ v_TBND.permute(1, 2, 0, 3)).flatten(1, 2)[None]
