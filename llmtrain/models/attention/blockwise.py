"""Attention in pieces: work follows the pattern, memory grows with the length of the sequence and not with its square.

Plain PyTorch on any device. The softmax runs over the pieces of a query as they come (Milakov and Gimelshein 2018); the
backward pass computes each piece's probabilities again from the saved log-sum (Dao et al. 2022, algorithm 4).

Shape suffixes: B micro-batch, N heads, S queries, T keys, D size of one head, R distances; small letters s, t, r are
those of one piece.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llmtrain.models.attention.patterns import Extent, Piece
from llmtrain.models.attention.scoring import Scoring, both, repeated_kv
from llmtrain.models.attention.tiles import Tile, tiles
from llmtrain.models.compiled_graphs import outside_of_graphs
from llmtrain.parallel.parts import HeldPositions
from llmtrain.parallel.stateless_random import Span

NOTHING = float("-inf")


def blockwise_attention(q_SBND: Tensor, k_TBND: Tensor, v_TBND: Tensor, scoring: Scoring) -> Tensor:
    """[S, B, N, D]. A query that sees no key gets zeros, and so do gradients."""
    k, v = repeated_kv(k_TBND, q_SBND.shape[2]), repeated_kv(v_TBND, q_SBND.shape[2])
    q, k, v = (x.permute(1, 2, 0, 3).contiguous() for x in (q_SBND, k, v))
    # A graph would unroll all pieces.
    out_BNSD = outside_of_graphs(Blockwise.apply, scoring, q, k, v, scoring.by_distance_NR, scoring.sinks_N)
    return out_BNSD.permute(2, 0, 1, 3)


@dataclass(frozen=True, eq=False)
class Work:
    """Some of the queries of a sequence and some of the keys: the scoring, the weights that belong to it (as autograd
    hands them over), and which queries and keys of the whole these are."""

    scoring: Scoring
    by_distance_NR: Tensor | None
    sinks_N: Tensor | None
    extent: Extent
    """Of the whole."""
    queries: HeldPositions
    """Numbers of queries, not positions: with a cache the first query stands behind what was decoded before."""
    keys: HeldPositions
    device: torch.device

    @staticmethod
    def of(scoring: Scoring, q: Tensor, k: Tensor, by_distance_NR: Tensor | None, sinks_N: Tensor | None) -> "Work":
        """All queries and keys."""
        extent = Extent(q.shape[2], k.shape[2], scoring.visible.looks_ahead)
        queries, keys = (HeldPositions((range(x.shape[2]),), x.shape[2]) for x in (q, k))
        return Work(scoring, by_distance_NR, sinks_N, extent, queries, keys, q.device)

    def tiles(self) -> Iterator[Tile]:
        return tiles(self.scoring.pattern, self.extent, self.queries, self.keys)

    def positions(self, piece: Piece) -> tuple[Tensor, Tensor]:
        """The positions of the piece's queries and keys."""
        queries, keys, offset = piece.queries, piece.keys, self.extent.offset
        s = torch.arange(queries.start + offset, queries.stop + offset, queries.step or 1, device=self.device)
        return s, torch.arange(keys.start, keys.stop, keys.step or 1, device=self.device)

    def behind(self, piece: Piece) -> bool:
        """True where no key lies ahead of any query."""
        return range(self.extent.num_keys)[piece.keys][-1] <= piece.queries.start + self.extent.offset

    def mask(self, piece: Piece) -> Tensor | None:
        """[1 or B, 1, 1 or s, t], True where seen; None: everything is."""
        s, t = self.positions(piece)
        visible = self.scoring.visible
        order = None if self.behind(piece) else visible.order(s, t)
        mask = both(order, visible.belonging(piece.queries, piece.keys))
        if piece.rule is not None:
            mask = both(mask, piece.rule(s[:, None], t)[None])
        return None if mask is None else mask[:, None]

    def scores(self, piece: Piece, q_BNsD: Tensor, k_BNtD: Tensor) -> tuple[Tensor, Tensor | None]:
        """(scores [B, N, s, t], -inf where a key is not seen; tanh of the capped ones where they are capped)."""
        scores = q_BNsD @ k_BNtD.mT
        scores = scores.to(wide(scores.dtype)) * self.scoring.scale
        bent, softcap = None, self.scoring.softcap
        if softcap is not None:
            bent = torch.tanh(scores / softcap)
            scores = softcap * bent
        if self.by_distance_NR is not None:
            s, t = self.positions(piece)
            scores = scores + self.by_distance_NR[:, t - s[:, None] + self.extent.num_keys - 1]
        mask = self.mask(piece)
        return scores if mask is None else scores.masked_fill(~mask, NOTHING), bent

    def kept(self, piece: Piece, shape: torch.Size) -> Tensor | None:
        """[B, N, s, t]: dropout's factors of the weights; None without dropout."""
        dropout = self.scoring.dropout
        if dropout is None:
            return None
        spans = (
            Span(0, shape[0]),
            dropout.heads,
            Span(piece.queries.start, self.extent.num_queries, piece.queries.step or 1),
            Span(piece.keys.start, self.extent.num_keys, piece.keys.step or 1),
        )
        return dropout.draws.keep_mask(dropout.site, dropout.probability, shape, spans) / (1 - dropout.probability)


class Blockwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scoring: Scoring, *tensors: Any) -> Tensor:
        q, k, v, by_distance, sinks = tensors
        work = Work.of(scoring, q, k, by_distance, sinks)
        wide_BNSD, log_sum_BNS = attended(work, q, k, v)
        out_BNSD = wide_BNSD.to(q.dtype)
        ctx.scoring = scoring
        ctx.save_for_backward(q, k, v, by_distance, sinks, out_BNSD, finite(log_sum_BNS))
        return out_BNSD

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, by_distance, sinks, out, log_sum = ctx.saved_tensors
        work = Work.of(ctx.scoring, q, k, by_distance, sinks)
        delta_BNS = weighted(out, grads[0])
        *of_qkv, of_distances = gradients(work, (q, k, v), (log_sum, delta_BNS), grads[0])
        of_qkv = (gradient.to(q.dtype) for gradient in of_qkv)
        return None, *of_qkv, of_distances, None if sinks is None else gradient_of_sinks(sinks, log_sum, delta_BNS)


def attended(work: Work, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """(out [B, N, s, D], log of the sum of exponentiated scores [B, N, s], -inf where nothing is seen), in fp32 at
    least."""
    dtype = wide(q.dtype)
    out_BNSD = torch.zeros(q.shape, dtype=dtype, device=q.device)
    sum_BNS = torch.zeros(q.shape[:3], dtype=dtype, device=q.device)
    peak_BNS = torch.full_like(sum_BNS, NOTHING)
    if work.sinks_N is not None:
        # A sink is a score without a value: it opens the sum with e^(sink - peak) = 1.
        peak_BNS[:] = work.sinks_N[:, None]
        sum_BNS += 1
    # With peak m, sum l and output o of the keys so far, and scores x of a piece:
    #   m' = max(m, max x),  l' = l e^(m - m') + sum e^(x - m'),  o' = o e^(m - m') + e^(x - m') v;  in the end o / l.
    for piece, queries, keys in work.tiles():
        rows = (slice(None), slice(None), queries)
        scores, _ = work.scores(piece, q[rows], k[:, :, keys])
        peak = torch.maximum(peak_BNS[rows], scores.amax(-1))
        shift = peak.masked_fill(peak == NOTHING, 0.0)  # a query that has seen nothing yet: -inf - -inf is no number
        weights = torch.exp(scores - shift[..., None])
        fade = torch.exp(peak_BNS[rows] - shift)
        sum_BNS[rows] = sum_BNS[rows] * fade + weights.sum(-1)
        kept = work.kept(piece, weights.shape)
        added = (weights if kept is None else weights * kept).to(v.dtype) @ v[:, :, keys]
        out_BNSD[rows] = out_BNSD[rows] * fade[..., None] + added
        peak_BNS[rows] = peak
    seen = sum_BNS > 0
    return out_BNSD / torch.where(seen, sum_BNS, 1.0)[..., None], peak_BNS + sum_BNS.log()


def finite(log_sum_BNS: Tensor) -> Tensor:
    """0 where nothing is seen, so that scores of -inf can be set off against it."""
    return log_sum_BNS.masked_fill(log_sum_BNS == NOTHING, 0.0)


def weighted(out: Tensor, grad_out: Tensor) -> Tensor:
    """[B, N, S]: the sum of O dO over the size of a head, which is that of P dP over the keys."""
    return (grad_out.to(wide(out.dtype)) * out.to(wide(out.dtype))).sum(-1)


def gradients(
    work: Work, qkv: tuple[Tensor, Tensor, Tensor], results: tuple[Tensor, Tensor], grad_out: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The gradients of q, k, v and the scores by distance, in fp32 at least; `results` are log_sum and delta.

    With scores x, probabilities P = exp(x - log_sum), dropout's factors K, and O = (P K) V:

        dV = (P K)^T dO            dP = (dO V^T) K            delta = sum_d dO O = sum_t P dP
        dx = P (dP - delta)        of capped scores x = c tanh(u): du = dx (1 - tanh^2 u)
        dQ = scale du K_           dK_ = scale du^T Q         (K_: the keys)

    log_sum and delta are over all keys, so that these hold for any part of them too.
    """
    (q, k, v), (log_sum_BNS, delta_BNS) = qkv, results
    dtype = wide(q.dtype)
    grad_q, grad_k, grad_v = (torch.zeros(x.shape, dtype=dtype, device=x.device) for x in qkv)
    by_distance = work.by_distance_NR
    grad_by_distance = torch.zeros_like(by_distance) if by_distance is not None and by_distance.requires_grad else None
    # The scores are computed again: kept, they would be the square of the sequence.
    for piece, queries, keys in work.tiles():
        rows, columns = (slice(None), slice(None), queries), (slice(None), slice(None), keys)
        scores, bent = work.scores(piece, q[rows], k[columns])
        probabilities = torch.exp(scores - log_sum_BNS[rows][..., None])
        kept = work.kept(piece, probabilities.shape)
        weights, grad_weights = probabilities, (grad_out[rows] @ v[columns].mT).to(dtype)
        if kept is not None:
            weights, grad_weights = weights * kept, grad_weights * kept
        grad_v[columns] += weights.to(v.dtype).mT @ grad_out[rows]
        grad_scores = probabilities * (grad_weights - delta_BNS[rows][..., None])
        if grad_by_distance is not None:  # added behind the cap: before the cap's factor
            grad_by_distance[:, columns_of(piece, work.extent)] += sums_by_distance(grad_scores.sum(0))
        if bent is not None:
            grad_scores = grad_scores * (1 - bent * bent)
        grad_scores = (grad_scores * work.scoring.scale).to(q.dtype)
        grad_q[rows] += grad_scores @ k[columns]
        grad_k[columns] += grad_scores.mT @ q[rows]
    return grad_q, grad_k, grad_v, grad_by_distance


def gradient_of_sinks(sinks_N: Tensor, log_sum_BNS: Tensor, delta_BNS: Tensor) -> Tensor:
    """A sink has a probability and no value, so dP = 0 for it: d sink = -sum exp(sink - log_sum) delta."""
    taken_BNS = torch.exp(sinks_N[:, None] - log_sum_BNS)
    return -(taken_BNS * delta_BNS).sum((0, 2)).to(sinks_N.dtype)


def columns_of(piece: Piece, extent: Extent) -> slice:
    """The columns of a piece's distances, smallest first, among the scores by distance."""
    step = piece.keys.step or 1
    queries, keys = range(extent.num_queries)[piece.queries], range(extent.num_keys)[piece.keys]
    smallest = keys[0] - (queries[-1] + extent.offset) + extent.num_keys - 1
    return slice(smallest, smallest + step * (len(queries) + len(keys) - 1), step)


def sums_by_distance(x_Nst: Tensor) -> Tensor:
    """[N, r]: sums along the diagonals, smallest distance first. By reshaping: scattered sums have no fixed order."""
    heads, s, t = x_Nst.shape
    # A row as much longer as there are rows, read as one shorter by one, is moved by one more than the row before.
    rows = F.pad(x_Nst.flip(1), (0, s)).flatten(1)[:, :-s]
    return rows.view(heads, s, s + t - 1).sum(1)


def wide(dtype: torch.dtype) -> torch.dtype:
    """fp32, or fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)
