"""The scoring of one call of a kernel: how scores become weights, and which keys a query sees at all.

Shape suffixes: B micro-batch, S queries, T keys, N heads, R distances.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from llmtrain.models.attention.patterns import Extent, Pattern
from llmtrain.models.positions import PositionBias
from llmtrain.parallel.stateless_random import Draws, Span

ALL = slice(None)


@dataclass(frozen=True, eq=False)
class Visibility:
    """The keys that a query may see, as far as order, documents, padding and prefixes decide it.

    Query s sees key t where the kind allows it, and t <= s or t < prefix if `causal`, and both belong to one document.
    With a cache, `keys_BT` covers the cached keys too; the last query stands at the position of the last key.
    """

    causal: bool = True
    queries_BS: Tensor | None = None
    """Document number of each query (-1: padding). None: keys need only be no padding."""
    keys_BT: Tensor | None = None
    """Document number of each key (-1: padding). None: all keys belong together."""
    prefix_B: Tensor | None = None
    """Causal only: keys before this position are seen by every query of the sample."""
    made: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)
    """Masks made from this value, which all layers share."""

    def __post_init__(self) -> None:
        assert self.queries_BS is None or self.keys_BT is not None, "documents of queries need those of keys"
        assert self.prefix_B is None or self.causal, "without an order there is no prefix"

    @property
    def looks_ahead(self) -> bool:
        """True where a query may see keys behind its own position."""
        return not self.causal or self.prefix_B is not None

    @property
    def may_see_nothing(self) -> bool:
        """True where a query of self-attention may be left without any key, its own included."""
        return self.keys_BT is not None and self.keys_BT is not self.queries_BS

    def order(self, s_S: Tensor, t_T: Tensor) -> Tensor | None:
        """[1 or B, S, T] for queries and keys at these positions: what causality leaves; None: everything."""
        if not self.causal:
            return None
        before = (t_T <= s_S[:, None])[None]
        return before if self.prefix_B is None else before | (t_T < self.prefix_B[:, None])[:, None]

    def belonging(self, queries: slice = ALL, keys: slice = ALL) -> Tensor | None:
        """[B, 1 or S, T] for these of the queries and keys: what documents and padding leave; None: everything."""
        if self.keys_BT is None:
            return None
        keys_B1T = self.keys_BT[:, None, keys]
        return keys_B1T >= 0 if self.queries_BS is None else self.queries_BS[:, queries, None] == keys_B1T

    def allowed(self, num_queries: int, num_keys: int, device: torch.device) -> Tensor | None:
        """[1 or B, 1 or S, T], True where seen; None where everything is. Made once, for all layers; but a compiled
        layer makes its own, since it would be compiled again for each change of what it finds made."""
        key = (num_queries, num_keys)
        if torch.compiler.is_compiling() or key not in self.made:
            s_S = torch.arange(num_keys - num_queries, num_keys, device=device)
            order = self.order(s_S, torch.arange(num_keys, device=device))
            mask = both(order, self.belonging())
            if torch.compiler.is_compiling():
                return mask
            self.made[key] = mask
        return self.made[key]


def both(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """a & b, where None is True everywhere."""
    if a is None or b is None:
        return b if a is None else a
    return a & b


@dataclass(frozen=True, eq=False)
class ProbabilityDropout:
    """Stateless dropout on probabilities. `heads` places this rank's heads among all."""

    probability: float
    site: Tensor
    draws: Draws
    heads: Span


@dataclass(frozen=True, eq=False)
class Scoring:
    """score = scale * q k; then softcap * tanh(score / softcap); then the scores by position are added; keys that the
    pattern or the visibility leaves out get no weight; softmax, in which each head's sink takes part; dropout."""

    pattern: Pattern
    visible: Visibility
    scale: float
    softcap: float | None = None
    by_distance_NR: Tensor | None = None
    """Scores by position: column r is for distance (key - query) r - (T - 1)."""
    sinks_N: Tensor | None = None
    dropout: ProbabilityDropout | None = None


def repeated_kv(x_TBND: Tensor, num_heads: int) -> Tensor:
    """Repeat key or value heads so that query head n finds head n // (num_heads / num_kv_heads)."""
    return x_TBND if x_TBND.shape[2] == num_heads else x_TBND.repeat_interleave(num_heads // x_TBND.shape[2], dim=2)


def scores_by_distance(bias: PositionBias, extent: Extent, heads: range, device: torch.device) -> Tensor:
    """[N, R] for some of the global heads: what stands in the square of S x T as often as it is long, only once.

    The last query stands at the position of the last key, so distances run from 1 - T to S - 1.
    """
    # Scores depend on the distance alone: one query at 0, and keys at all distances that occur, give each score once.
    away = torch.arange(1 - extent.num_keys, extent.num_queries, device=device)
    return bias.scores(torch.zeros(1, dtype=away.dtype, device=device), away, heads.start, len(heads))[:, 0]
