"""Context parallelism by heads: the sequence is split everywhere but in the attention kernel, where the heads are.

The other way, in which the sequence stays split there too, is ring.py.

Before the kernel each rank trades its part of the sequence, all heads, for the whole sequence of some heads; after it,
back (the idea of DeepSpeed-Ulysses, Jacobs et al. 2023).

Shape suffixes: s this rank's part of the sequence, S the whole, B micro-batch, N heads, n this rank's part of them,
D size of one head.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def trade_sequence_for_heads(x_sBND: Tensor, group: ProcessGroup) -> Tensor:
    """[S, B, n, D]."""
    # all_to_all deals the leading dimension: the heads of rank r have to lie in block r. What arrives lies by sender,
    # and senders are in the order of the sequence.
    s, batch, heads, size = x_sBND.shape
    send = x_sBND.view(s, batch, group.size(), heads // group.size(), size).movedim(2, 0).contiguous()
    received = torch.empty_like(send)
    dist.all_to_all_single(received, send, group=group)
    return received.flatten(0, 1)


def trade_heads_for_sequence(x_SBnD: Tensor, group: ProcessGroup) -> Tensor:
    """[s, B, N, D]: the inverse of `trade_sequence_for_heads`."""
    send = x_SBnD.contiguous().unflatten(0, (group.size(), -1))
    received = torch.empty_like(send)
    dist.all_to_all_single(received, send, group=group)
    return received.movedim(0, 2).flatten(2, 3)


class SequenceForHeads(torch.autograd.Function):
    """Gradients go the way back: the transpose of a permutation over ranks is its inverse."""

    @staticmethod
    def forward(ctx: Any, x_sBND: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return trade_sequence_for_heads(x_sBND, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return trade_heads_for_sequence(grads[0], ctx.group), None


class HeadsForSequence(torch.autograd.Function):
    """The inverse of `SequenceForHeads`."""

    @staticmethod
    def forward(ctx: Any, x_SBnD: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return trade_heads_for_sequence(x_SBnD, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return trade_sequence_for_heads(grads[0], ctx.group), None


def spread_over_context(kernel: Callable[..., Tensor], group: ProcessGroup) -> Callable[..., Tensor]:
    """An attention kernel (q, k, v, inputs) -> out on whole sequences, as one on parts of the sequence.

    Fewer key heads than ranks, or a number that the ranks do not divide, are repeated until they can be dealt out.
    """

    def attend(q_sBND: Tensor, k_sBND: Tensor, v_sBND: Tensor, inputs: Any) -> Tensor:
        kv_heads = k_sBND.shape[2]
        repeats = math.lcm(kv_heads, group.size()) // kv_heads
        k, v = (x.repeat_interleave(repeats, dim=2) if repeats > 1 else x for x in (k_sBND, v_sBND))
        q, k, v = (SequenceForHeads.apply(x, group) for x in (q_sBND, k, v))
        return HeadsForSequence.apply(kernel(q, k, v, inputs), group)

    return attend
