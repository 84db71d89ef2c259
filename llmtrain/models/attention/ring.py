"""Attention whose keys and values go round a ring of context ranks, in blocks (Liu et al. 2023, Ring Attention).

Each rank keeps its queries. It computes what they get from the block that is here while the next one is on its way, and
joins the results by their log-sums. Backward, the blocks go round once more, and behind them the gradients of keys and
values, to which every rank adds its part, and which come home in the end. No rank ever has the whole sequence, and key
heads are sent as they are, however few.

Shape suffixes: s this rank's queries, t keys of a block, B micro-batch, N heads, K key heads, D size of one head,
R distances; 2 keys and values.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from llmtrain.models.attention.blockwise import (
    NOTHING,
    Work,
    attended,
    finite,
    gradient_of_sinks,
    gradients,
    weighted,
    wide,
)
from llmtrain.models.attention.fused_blocks import FusedBlocks, can_fuse
from llmtrain.models.attention.patterns import Extent
from llmtrain.models.attention.scoring import Scoring, repeated_kv
from llmtrain.models.attention.tiles import needed_moves
from llmtrain.models.compiled_graphs import outside_of_graphs
from llmtrain.parallel.parts import cut_sequence
from llmtrain.parallel.ring import Ring, Transfer


def ring_attention(q_sBND: Tensor, k_tBKD: Tensor, v_tBKD: Tensor, scoring: Scoring, ring: Ring) -> Tensor:
    """[s, B, N, D] for this rank's queries, which see the keys of all ranks. A query that sees no key gets zeros."""
    tensors = (q_sBND, k_tBKD, v_tBKD, scoring.by_distance_NR, scoring.sinks_N)
    return outside_of_graphs(RingAttention.apply, Turn(scoring, ring), *tensors)


class BlockKernel(Protocol):
    """Attention of some queries to some keys. Key heads are as many as query heads, or fewer where it `groups`."""

    @property
    def groups(self) -> bool: ...

    def forward(
        self, work: Work, q_BNsD: Tensor, k_BNtD: Tensor, v_BNtD: Tensor
    ) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """For runs of the queries: (which, out [B, N, s, D], log-sum [B, N, s], -inf where nothing is seen)."""
        ...

    def backward(
        self, work: Work, qkv: tuple[Tensor, Tensor, Tensor], results: tuple[Tensor, Tensor], grad_out: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """The block's part of the gradients of q, k, v and the scores by distance; `results`, (out, log-sum), are
        those over all blocks."""
        ...


class BlockwiseBlocks:
    """The kernel that knows every pattern, score and mask, in plain PyTorch."""

    groups = False

    def forward(
        self, work: Work, q_BNsD: Tensor, k_BNtD: Tensor, v_BNtD: Tensor
    ) -> Iterator[tuple[slice, Tensor, Tensor]]:
        yield slice(None), *attended(work, q_BNsD, k_BNtD, v_BNtD)

    def backward(
        self, work: Work, qkv: tuple[Tensor, Tensor, Tensor], results: tuple[Tensor, Tensor], grad_out: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        out, log_sum_BNs = results
        return gradients(work, qkv, (log_sum_BNs, weighted(out, grad_out)), grad_out)


@dataclass(frozen=True, eq=False)
class Turn:
    """One call: how scores become weights, and the ranks."""

    scoring: Scoring
    ring: Ring

    def extent(self, q_sBND: Tensor, kv_2tBKD: Tensor) -> Extent:
        """Of the whole sequence: all parts are equal."""
        ranks = self.ring.size
        return Extent(q_sBND.shape[0] * ranks, kv_2tBKD.shape[1] * ranks, self.scoring.visible.looks_ahead)

    def moves(self, extent: Extent) -> int:
        return needed_moves(self.scoring.pattern, extent, self.ring.size, self.ring.balanced)

    def work(self, extent: Extent, moves: int, by_distance_NR: Tensor | None, device: torch.device) -> Work:
        """What there is to do with the block that is here after so many moves. Sinks are no key: they come last."""
        ring, here = self.ring, self.ring.place
        queries = cut_sequence(extent.num_queries, here, ring.size, ring.balanced)
        keys = cut_sequence(extent.num_keys, (here - moves) % ring.size, ring.size, ring.balanced)
        return Work(self.scoring, by_distance_NR, None, extent, queries, keys, device)

    def kernel(self, q_sBND: Tensor) -> BlockKernel:
        return FusedBlocks(groups=q_sBND.is_cuda) if can_fuse(q_sBND, self.scoring) else BlockwiseBlocks()

    def blocks(self, own_2tBKD: Tensor, moves: int) -> Iterator[Tensor]:
        """The block that is here after 0, 1, ... moves. The next one is on its way while a block is used."""
        block = own_2tBKD
        for move in range(moves + 1):
            transfer = self.ring.shift(block, 1, "blocks") if move < moves else None
            yield block
            if transfer is not None:
                block = transfer.wait()


class RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, turn: Turn, *tensors: Any) -> Tensor:
        q_sBND, k, v, by_distance, sinks = tensors
        kv_2tBKD = torch.stack((k, v))  # one message
        out_sBND, log_sum_BNs = joined(turn, q_sBND, kv_2tBKD, by_distance)
        if sinks is not None:
            # A sink adds to the sum of exponentials alone: every weight shrinks by what it takes.
            all_BNs = torch.logaddexp(log_sum_BNs, sinks[:, None])
            out_sBND *= by_rows(torch.exp(log_sum_BNs - all_BNs))
            log_sum_BNs = all_BNs
        out_sBND = out_sBND.to(q_sBND.dtype)
        ctx.turn = turn
        ctx.save_for_backward(q_sBND, kv_2tBKD, by_distance, sinks, out_sBND, finite(log_sum_BNs))
        return out_sBND

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q_sBND, kv_2tBKD, by_distance, sinks, out, log_sum_BNs = ctx.saved_tensors
        grad_sinks = None
        if sinks is not None:
            grad_sinks = gradient_of_sinks(sinks, log_sum_BNs, weighted(by_heads(out), by_heads(grads[0])))
        grad_q, grad_kv, grad_by_distance = ring_gradients(
            ctx.turn, (q_sBND, kv_2tBKD, by_distance), (out, log_sum_BNs), grads[0]
        )
        return None, grad_q.to(q_sBND.dtype), *grad_kv.to(kv_2tBKD.dtype), grad_by_distance, grad_sinks


def joined(turn: Turn, q_sBND: Tensor, kv_2tBKD: Tensor, by_distance_NR: Tensor | None) -> tuple[Tensor, Tensor]:
    """(out [s, B, N, D], log-sum [B, N, s], -inf where nothing is seen) over all blocks, in fp32 at least.

    Of two results o and o' with log-sums l and l', both together have L = log(e^l + e^l') and
    o e^(l - L) + o' e^(l' - L).
    """
    extent, kernel, q = turn.extent(q_sBND, kv_2tBKD), turn.kernel(q_sBND), by_heads(q_sBND)
    out_sBND = torch.zeros_like(q_sBND, dtype=wide(q.dtype), memory_format=torch.contiguous_format)
    out_BNsD = by_heads(out_sBND)
    log_sum_BNs = out_BNsD.new_full(q.shape[:3], NOTHING)
    for moves, block in enumerate(turn.blocks(kv_2tBKD, turn.moves(extent))):
        work = turn.work(extent, moves, by_distance_NR, q.device)
        for rows, more_out, more_sum in kernel.forward(work, q, *heads_of(block, q, kernel)):
            here = log_sum_BNs[:, :, rows]
            both = torch.logaddexp(here, more_sum)
            base = finite(both)  # -inf - -inf is no number
            out_BNsD[:, :, rows] *= torch.exp(here - base)[..., None]
            out_BNsD[:, :, rows] += torch.exp(more_sum - base)[..., None] * more_out
            log_sum_BNs[:, :, rows] = both
    return out_sBND, log_sum_BNs


def ring_gradients(
    turn: Turn, inputs: tuple[Tensor, Tensor, Tensor | None], results: tuple[Tensor, Tensor], grad_out_sBND: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradients of q [s, B, N, D], of this rank's keys and values [2, t, B, K, D], and of the scores by distance.

    Those of keys and values follow their block: each rank adds its part to what the rank before has sent, in fp32. A
    rank's own part waits at home.
    """
    (q_sBND, kv_2tBKD, by_distance), (out, log_sum_BNs) = inputs, results
    extent, kernel, q = turn.extent(q_sBND, kv_2tBKD), turn.kernel(q_sBND), by_heads(q_sBND)
    last = turn.moves(extent)
    heads_out, heads_grad_out = by_heads(out), by_heads(grad_out_sBND)
    grad_q: Any = 0
    home: Any = None
    grad_by_distance = None
    following: Transfer | None = None
    for moves, block in enumerate(turn.blocks(kv_2tBKD, last)):
        work = turn.work(extent, moves, by_distance, q.device)
        part_q, part_k, part_v, part_by_distance = kernel.backward(
            work, (q, *heads_of(block, q, kernel)), (heads_out, log_sum_BNs), heads_grad_out
        )
        grad_q = grad_q + part_q
        if part_by_distance is not None:
            grad_by_distance = part_by_distance if grad_by_distance is None else grad_by_distance + part_by_distance
        part_2tBKD = torch.stack([summed_heads(part, kv_2tBKD.shape[3]) for part in (part_k, part_v)])
        if moves == 0:
            home = part_2tBKD
            continue
        if following is not None:
            part_2tBKD += following.wait()
        # On with the block to the next rank; from the last one straight home, however far.
        following = turn.ring.shift(part_2tBKD, 1 if moves < last else -last, "gradients")
    if following is not None:
        home += following.wait()
    return grad_q.permute(2, 0, 1, 3), home, grad_by_distance


def by_heads(x_sBND: Tensor) -> Tensor:
    """[B, N, s, D], the same memory."""
    return x_sBND.permute(1, 2, 0, 3)


def by_rows(x_BNs: Tensor) -> Tensor:
    """[s, B, N, 1], the same memory."""
    return x_BNs.permute(2, 0, 1)[..., None]


def heads_of(kv_2tBKD: Tensor, q_BNsD: Tensor, kernel: BlockKernel) -> tuple[Tensor, Tensor]:
    """Keys and values of a block, [B, N, t, D] each: where they have to be repeated, here, where only a block is."""
    k, v = (by_heads(x if kernel.groups else repeated_kv(x, q_BNsD.shape[1])) for x in kv_2tBKD)
    return k, v


def summed_heads(grad_BNtD: Tensor, num_kv_heads: int) -> Tensor:
    """[t, B, K, D] in fp32 at least: the sum over the query heads of each key head, where there are more."""
    grouped = grad_BNtD.to(wide(grad_BNtD.dtype)).unflatten(1, (num_kv_heads, -1)).sum(2)
    return grouped.permute(2, 0, 1, 3)
