"""Attention as one product of all queries and all keys, for graphs that run elsewhere.

A graph is made once for every number of rows, queries and keys, so nothing here is decided by them, and no piece of
work has a place of its own as in blockwise.py. Where a query and a key stand follows from the mask of the keys alone:
the positions of a row count what is no padding, which may lie on either side.

Shape suffixes: B rows, S queries, T keys, N heads of queries, n of keys, G of queries for one of keys, D size of one
head, E = D + 1.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from llmtrain.models.attention.linear import normalized, prepared
from llmtrain.models.attention.scoring import Scoring, Visibility
from llmtrain.models.positions import at_least_fp32


@dataclass(frozen=True, eq=False)
class TextPlaces:
    """The positions of queries and keys, and which keys are no padding. The queries are the last keys."""

    queries_BS: Tensor
    keys_BT: Tensor
    seen_BT: Tensor
    longest: int
    """The longest sequence: rules that have a table have it for so many positions."""
    made: dict[Any, Tensor] = field(default_factory=dict, init=False, repr=False)
    """Masks made from this value, which all layers share."""

    @staticmethod
    def of(mask_BT: Tensor, num_queries: int, longest: int) -> "TextPlaces":
        """`mask_BT` is 1 where a key is no padding, else 0."""
        keys_BT = (mask_BT.cumsum(1) - 1).clamp(min=0)
        return TextPlaces(last(keys_BT, num_queries), keys_BT, mask_BT > 0, longest)

    def mask(self, scoring: Scoring) -> Tensor:
        """[B, S, T], or [B, 1, T] where that is the same for all queries: True where the query sees the key."""
        key = (scoring.pattern, scoring.visible.causal)
        if key not in self.made:
            s, t = self.queries_BS[:, :, None], self.keys_BT[:, None]
            mask_BST = self.seen_BT[:, None]
            if scoring.visible.causal:
                mask_BST = mask_BST & (t <= s)
            rule = scoring.pattern.rule(self.longest, t.device)
            self.made[key] = mask_BST if rule is None else mask_BST & rule(s, t)
        return self.made[key]

    def scores(self, by_distance_NR: Tensor) -> Tensor:
        """[B, N, S, T]: column r of the scores by position is for distance (key - query) r - (T - 1)."""
        column_BST = self.keys_BT[:, None] - self.queries_BS[:, :, None] + self.keys_BT.shape[1] - 1
        return by_distance_NR[:, column_BST].transpose(0, 1)


def last(x_BT: Tensor, count: int) -> Tensor:
    """[B, count]: the last columns. Looked up, not cut: a cut asks whether it leaves anything out, and a graph that was
    made where it does would not be one for where it does not."""
    return x_BT.index_select(1, torch.arange(count, device=x_BT.device) + (x_BT.shape[1] - count))


@dataclass(eq=False)
class DenseKeys:
    """The keys and values of one attention, [B, n, T, D] each: those of before, and what `append` puts behind them."""

    places: TextPlaces
    pair: tuple[Tensor, Tensor] | None = None

    def append(self, k_SBND: Tensor, v_SBND: Tensor) -> None:
        new = (k_SBND.permute(1, 2, 0, 3), v_SBND.permute(1, 2, 0, 3))
        before = self.pair
        self.pair = new if before is None else (torch.cat((before[0], new[0]), 2), torch.cat((before[1], new[1]), 2))

    def attended(self, q_SBND: Tensor, scoring_of: Callable[[Tensor, Tensor], Scoring]) -> Tensor:
        """[S, B, N, D]; see `Scoring`. A query that sees no key, which only padding is, gets something finite."""
        assert self.pair is not None, "keys are there before they are read"
        keys, values = self.pair
        num_queries, heads = q_SBND.shape[0], keys.shape[1]
        scoring = scoring_of(q_SBND, keys.permute(2, 0, 1, 3))
        # Queries of one head of keys lie one behind the other, so that no key is copied.
        q_BnXD = q_SBND.permute(1, 2, 0, 3).unflatten(1, (heads, -1)).flatten(2, 3)
        scores = at_least_fp32(q_BnXD @ keys.mT).unflatten(2, (-1, num_queries)).flatten(1, 2) * scoring.scale
        if scoring.softcap is not None:
            scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
        if scoring.by_distance_NR is not None:
            scores = scores + self.places.scores(scoring.by_distance_NR)
        scores = scores.masked_fill(~self.places.mask(scoring)[:, None], torch.finfo(scores.dtype).min)
        if scoring.sinks_N is not None:
            sinks = scoring.sinks_N[None, :, None, None].expand(*scores.shape[:3], 1)
            weights = torch.cat((scores, sinks), -1).softmax(-1)[..., :-1]
        else:
            weights = scores.softmax(-1)
        weights_BnXT = weights.to(values.dtype).unflatten(1, (heads, -1)).flatten(2, 3)
        return (weights_BnXT @ values).unflatten(2, (-1, num_queries)).flatten(1, 2).permute(2, 0, 1, 3)


@dataclass(eq=False)
class DenseSums:
    """Linear attention's memory of rows, [B, N, D, E]; None where they have seen nothing, and of an encoder."""

    places: TextPlaces
    sums: Tensor | None = None

    def attended(self, q_SBND: Tensor, k_SBND: Tensor, v_SBND: Tensor, visible: Visibility) -> Tensor:
        """[S, B, N, D], and the sums have the new positions."""
        q, k, v = prepared(q_SBND, k_SBND, v_SBND, Visibility(visible.causal))
        k = k * last(self.places.seen_BT, q.shape[2])[:, None, :, None]
        sums = k.mT @ v
        if not visible.causal:
            return normalized(q @ sums, q_SBND.dtype)
        out = (q @ k.mT).tril() @ v
        if self.sums is not None:
            out, sums = out + q @ self.sums, self.sums + sums
        self.sums = sums
        return normalized(out, q_SBND.dtype)
