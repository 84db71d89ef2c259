"""Patterns and altered scores on a GPU: FlexAttention, whose kernels skip the blocks that nothing is left of.

PyTorch compiles it on first use, for the forward pass on the CPU too, where it has no backward pass.

Shape suffixes: B micro-batch, N heads, S sequence, D size of one head, P and Q blocks of queries and of keys.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from llmtrain.models.attention.patterns import Extent, Pattern
from llmtrain.models.attention.scoring import Scoring, Visibility
from llmtrain.models.compiled_graphs import compiled, outside_of_graphs
from llmtrain.models.positions import sent

BLOCK = 128
SMALLEST_HEAD = 16
"""Both are FlexAttention's: the block that it skips or computes, and the least size of a head. Of sequences that are
shorter than a block its kernel for the CPU computes wrong numbers (PyTorch 2.13), and there is nothing to skip."""


@cache
def compiled_flex_attention() -> Any:
    """Its kernels, compiled for the sizes at hand. The import takes seconds, so it waits for the first use."""
    from torch.nn.attention.flex_attention import flex_attention

    return compiled(flex_attention)


def can_flex(q_SBND: Tensor, k_SBND: Tensor, scoring: Scoring) -> bool:
    """True where FlexAttention computes this: no dropout, no cache, no fp64, no tiny heads, no short sequences, and
    no learned scores by distance, whose gradients it would add up in no fixed order."""
    learned = scoring.by_distance_NR is not None and scoring.by_distance_NR.requires_grad
    whole = q_SBND.shape[0] == k_SBND.shape[0] >= BLOCK
    fits = q_SBND.dtype != torch.float64 and q_SBND.shape[-1] >= SMALLEST_HEAD
    return scoring.dropout is None and not learned and whole and fits


def flex_kernel(q_SBND: Tensor, k_SBND: Tensor, v_SBND: Tensor, scoring: Scoring) -> Tensor:
    """[S, B, N, D]. A query that sees no key gets zeros."""
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q_SBND, k_SBND, v_SBND))
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    mask = outside_of_graphs(block_mask, scoring.pattern, scoring.visible, k.shape[2], q.device)
    run: Any = flex_attention if torch.compiler.is_compiling() else compiled_flex_attention()
    options = {
        "score_mod": score_rule(scoring, k.shape[2]),
        "block_mask": mask,
        "scale": scoring.scale,
        "enable_gqa": q.shape[1] != k.shape[1],
    }
    if scoring.sinks_N is None:
        return run(q, k, v, **options).permute(2, 0, 1, 3)
    # The kernel's softmax knows no sinks. They make its sum of exponentials e^lse larger by e^sink, so its result is to
    # be multiplied by e^lse / (e^lse + e^sink) = sigmoid(lse - sink).
    out, aux = run(q, k, v, **options, return_aux=AuxRequest(lse=True))
    share_BNS = torch.sigmoid(aux.lse - scoring.sinks_N[:, None])
    out = out * share_BNS[..., None].to(out.dtype)
    return out.permute(2, 0, 1, 3)


def score_rule(scoring: Scoring, num_keys: int) -> Callable[..., Tensor] | None:
    """The change to each score; None: there is none."""
    softcap, by_distance_NR = scoring.softcap, scoring.by_distance_NR
    if softcap is None and by_distance_NR is None:
        return None

    def changed(score: Tensor, b: Tensor, n: Tensor, s: Tensor, t: Tensor) -> Tensor:
        if softcap is not None:
            score = softcap * torch.tanh(score / softcap)
        return score if by_distance_NR is None else score + by_distance_NR[n, t - s + num_keys - 1]

    return changed


def block_mask(pattern: Pattern, visible: Visibility, seq_len: int, device: torch.device) -> Any:
    """The BlockMask: what is allowed, and which blocks have any of it. Made once per batch, for all layers."""
    from torch.nn.attention.flex_attention import BlockMask

    key = (pattern, seq_len)
    if key not in visible.made:
        blocks_BPQ = sent(touched_blocks(pattern, seq_len, visible.looks_ahead, BLOCK), device)[None]
        if visible.keys_BT is not None:
            blocks_BPQ = blocks_BPQ & blocks_with_company(visible, visible.keys_BT)
        visible.made[key] = BlockMask.from_kv_blocks(
            blocks_BPQ.sum(-1, dtype=torch.int32)[:, None],
            blocks_BPQ.int().argsort(dim=-1, descending=True, stable=True).int()[:, None],
            BLOCK_SIZE=BLOCK,
            mask_mod=mask_rule(pattern, visible, seq_len, device),
            seq_lengths=(seq_len, seq_len),
        )
    return visible.made[key]


def mask_rule(
    pattern: Pattern, visible: Visibility, seq_len: int, device: torch.device
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Pattern and visibility for single pairs."""
    rule = pattern.rule(seq_len, device)
    queries_BS, keys_BT, prefix_B = visible.queries_BS, visible.keys_BT, visible.prefix_B

    def allowed(b: Tensor, n: Tensor, s: Tensor, t: Tensor) -> Tensor:
        seen = t >= 0
        if visible.causal:
            seen = t <= s if prefix_B is None else (t <= s) | (t < prefix_B[b])
        if keys_BT is not None:
            seen = seen & (keys_BT[b, t] >= 0 if queries_BS is None else queries_BS[b, s] == keys_BT[b, t])
        return seen if rule is None else seen & rule(s, t)

    return allowed


@cache
def touched_blocks(pattern: Pattern, seq_len: int, looks_ahead: bool, block: int) -> Tensor:
    """[P, Q], True where the pattern has a piece in the block."""
    num_blocks = -(-seq_len // block)
    blocks_PQ = torch.zeros(num_blocks, num_blocks, dtype=torch.bool)
    for piece in pattern.pieces(Extent(seq_len, seq_len, looks_ahead, block)):
        rows = slice(piece.queries.start // block, -(-piece.queries.stop // block))
        blocks_PQ[rows, piece.keys.start // block : -(-piece.keys.stop // block)] = True
    return blocks_PQ


def blocks_with_company(visible: Visibility, keys_BT: Tensor) -> Tensor:
    """[B, P, Q], True where the ranges of document numbers in a block of queries and one of keys meet."""
    first_BQ, last_BQ = document_ranges(keys_BT)
    if visible.queries_BS is None:
        return (last_BQ >= 0)[:, None, :]
    first_BP, last_BP = document_ranges(visible.queries_BS)
    return (first_BP[:, :, None] <= last_BQ[:, None, :]) & (last_BP[:, :, None] >= first_BQ[:, None, :])


def document_ranges(documents_BS: Tensor) -> tuple[Tensor, Tensor]:
    """[B, P] each: the smallest and largest number in every block; the last one, where short, repeats its last."""
    missing = -documents_BS.shape[1] % BLOCK
    padded = torch.cat((documents_BS, documents_BS[:, -1:].expand(-1, missing)), dim=1).unflatten(1, (-1, BLOCK))
    return padded.amin(-1), padded.amax(-1)
