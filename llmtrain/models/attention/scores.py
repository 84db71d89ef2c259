"""How scores become weights, and what that rests on: one value for one call of a kernel.

Shape suffixes: B micro-batch, S queries, T keys, N heads, R distances.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from llmtrain.models.attention.patterns import Pattern
from llmtrain.models.attention.visibility import Visibility
from llmtrain.models.positions import PositionBias
from llmtrain.parallel.stateless_random import Draws, Span


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

    @property
    def plain(self) -> bool:
        """Whether weights are the softmax of scaled scores and nothing more."""
        return all(part is None for part in (self.softcap, self.by_distance_NR, self.sinks_N, self.dropout))


def repeated_kv(x_TBND: Tensor, num_heads: int) -> Tensor:
    """Repeat key or value heads so that query head n finds head n // (num_heads / num_kv_heads)."""
    return x_TBND if x_TBND.shape[2] == num_heads else x_TBND.repeat_interleave(num_heads // x_TBND.shape[2], dim=2)


def scores_by_distance(bias: PositionBias, queries: Tensor, num_keys: int, first_head: int) -> Tensor:
    """[N, R] for queries [S, B, N, D]: what stands in the square of S x T as often as it is long, only once.

    The last query stands at the position of the last key, so distances run from 1 - T to S - 1.
    """
    num_queries, num_heads = queries.shape[0], queries.shape[2]
    away = torch.arange(1 - num_keys, num_queries, device=queries.device)
    return bias.scores(torch.zeros(1, dtype=away.dtype, device=away.device), away, first_head, num_heads)[:, 0]
