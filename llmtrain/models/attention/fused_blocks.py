"""Attention of some queries to some keys by PyTorch's flash kernels, with the log-sums that its public function keeps.

`torch.nn.functional.scaled_dot_product_attention` returns no log-sum, and its backward pass takes none that is over
more keys than it has seen. The operators below it do both. They are PyTorch's own, but not documented: their signatures
are held by tests/unit/models/attention/test_fused_blocks.py.

Shape suffixes: s queries, t keys of a block, B micro-batch, N heads, D size of one head.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from llmtrain.models.attention.blockwise import Work, wide
from llmtrain.models.attention.patterns import Full
from llmtrain.models.attention.scoring import Scoring
from llmtrain.models.attention.tiles import Rectangle, rectangles

GPU_HEAD_MULTIPLE, GPU_LARGEST_HEAD = 8, 256
"""Sizes of a head that the flash kernel of a GPU takes."""


def can_fuse(q_sBND: Tensor, scoring: Scoring) -> bool:
    """True where the flash kernel computes this: nothing but order decides who sees whom, nothing changes a score."""
    visible = scoring.visible
    added = (scoring.softcap, scoring.by_distance_NR, scoring.sinks_N, scoring.dropout)
    plain = isinstance(scoring.pattern, Full) and all(part is None for part in added)
    masked = visible.keys_BT is not None or visible.prefix_B is not None
    if not plain or masked:
        return False
    if q_sBND.device.type != "cuda":
        return q_sBND.device.type == "cpu"
    size = q_sBND.shape[-1]
    fits = size % GPU_HEAD_MULTIPLE == 0 and size <= GPU_LARGEST_HEAD
    return fits and q_sBND.dtype in (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class FusedBlocks:
    """Flash attention, rectangle by rectangle: at most one where sequences are cut in one of our ways.

    `groups`: keys and values have fewer heads than queries, which the kernel of a GPU takes as they are.
    """

    groups: bool = False

    def forward(
        self, work: Work, q_BNsD: Tensor, k_BNtD: Tensor, v_BNtD: Tensor
    ) -> Iterator[tuple[slice, Tensor, Tensor]]:
        for part in self.parts(work):
            k, v = k_BNtD[:, :, part.columns], v_BNtD[:, :, part.columns]
            yield part.rows, *flash(q_BNsD[:, :, part.rows], k, v, part.is_causal, work.scoring.scale)

    def backward(
        self, work: Work, qkv: tuple[Tensor, Tensor, Tensor], results: tuple[Tensor, Tensor], grad_out: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, None]:
        grads = [torch.zeros(x.shape, dtype=wide(x.dtype), device=x.device) for x in qkv]
        for part in self.parts(work):
            places = (part.rows, part.columns, part.columns)
            q, k, v = (x[:, :, place] for x, place in zip(qkv, places, strict=True))
            out, log_sum_BNs = (x[:, :, part.rows] for x in results)
            kept = (q, k, v, out, log_sum_BNs.contiguous())
            found = flash_gradients(grad_out[:, :, part.rows], kept, part.is_causal, work.scoring.scale)
            for whole, more, place in zip(grads, found, places, strict=True):
                whole[:, :, place] += more
        return grads[0], grads[1], grads[2], None

    def parts(self, work: Work) -> list[Rectangle]:
        return rectangles(work.queries, work.keys, work.scoring.visible.causal)


def flash(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """(out [B, N, s, D], log-sum [B, N, s] in fp32)."""
    if q.is_cuda:
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal, scale=scale)[:2]
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, is_causal, scale=scale)


def flash_gradients(
    grad_out: Tensor, kept: tuple[Tensor, Tensor, Tensor, Tensor, Tensor], is_causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v; `kept` are these, the result and its log-sum over all keys."""
    aten = torch.ops.aten
    if not grad_out.is_cuda:
        backward = aten._scaled_dot_product_flash_attention_for_cpu_backward
        return backward(grad_out, *kept, 0.0, is_causal, scale=scale)
    num_queries, num_keys = kept[0].shape[2], kept[1].shape[2]
    # What it wants beside: no offsets, as sequences are of one length; and the state of a dropout that there is not.
    state = torch.zeros(2, dtype=torch.uint64, device=grad_out.device)
    lengths = (None, None, num_queries, num_keys)
    return aten._scaled_dot_product_flash_attention_backward(
        grad_out, *kept, *lengths, 0.0, is_causal, state, state[:0], scale=scale
    )
