"""Attention from its definitions: the whole square of scores, a mask from the documented words, no pieces."""

from typing import Any

import torch
from torch import Tensor

from llmtrain.config.attention import AttentionConfig
from llmtrain.models.attention_patterns import drawn_blocks
from llmtrain.models.visibility import Visibility

LENGTH = 40

KINDS: dict[str, dict[str, Any]] = {
    "full": {"kind": "full"},
    "sliding_window": {"kind": "sliding_window", "window": 6},
    "strided": {"kind": "strided", "stride": 5},
    "bigbird": {"kind": "bigbird", "block_size": 4, "num_global": 1, "num_random": 2},
    "longformer": {"kind": "longformer", "window": 4, "num_global": 3},
    "linear": {"kind": "linear"},
}
SOFTMAX_KINDS = [kind for kind in KINDS if kind != "linear"]
SPARSE_KINDS = SOFTMAX_KINDS[1:]


def pair_allowed(config: AttentionConfig, s: int, t: int) -> bool:
    """What docs/attention.md says of each kind, for one query and one key."""
    match config.kind:
        case "full" | "linear":
            return True
        case "sliding_window":
            return -config.window < s - t < config.window
        case "strided":
            return -config.stride < s - t < config.stride or s % config.stride == t % config.stride
        case "longformer":
            return -config.window < s - t < config.window or min(s, t) < config.num_global
        case "bigbird":
            earlier, later = sorted((s // config.block_size, t // config.block_size))
            drawn = drawn_blocks(later, config.num_global, config.num_random)
            return later - earlier <= 1 or earlier < config.num_global or earlier in drawn


def pair_visible(visible: Visibility, b: int, s: int, t: int, query: int) -> bool:
    """`query` is the index of the query, s its position."""
    ordered = not visible.causal or t <= s or (visible.prefix_B is not None and t < int(visible.prefix_B[b]))
    if visible.keys_BT is None:
        return ordered
    key = int(visible.keys_BT[b, t])
    return ordered and (key >= 0 if visible.queries_BS is None else key == int(visible.queries_BS[b, query]))


def dense_mask(config: AttentionConfig, visible: Visibility, batch: int, num_queries: int, num_keys: int) -> Tensor:
    """[B, S, T], pair by pair."""
    offset = num_keys - num_queries
    return torch.tensor(
        [
            [
                [
                    pair_allowed(config, s + offset, t) and pair_visible(visible, b, s + offset, t, s)
                    for t in range(num_keys)
                ]
                for s in range(num_queries)
            ]
            for b in range(batch)
        ]
    )


def softmax_attention(
    qkv: tuple[Tensor, Tensor, Tensor],
    mask_BST: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    bias_NST: Tensor | None = None,
    sinks_N: Tensor | None = None,
    kept_BNST: Tensor | None = None,
) -> Tensor:
    """[S, B, N, D]; `kept` is what dropout multiplies probabilities by."""
    q, k, v = qkv
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    scores = torch.einsum("sbnd,tbnd->bnst", q, k) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias_NST is not None:
        scores = scores + bias_NST
    mask = mask_BST[:, None]
    weights = torch.where(mask, scores, 0.0).exp() * mask
    total = weights.sum(-1, keepdim=True)
    if sinks_N is not None:
        total = total + sinks_N[:, None, None].exp()
    probabilities = weights / torch.where(total > 0, total, 1.0)
    if kept_BNST is not None:
        probabilities = probabilities * kept_BNST
    return torch.einsum("bnst,tbnd->sbnd", probabilities, v)


def linear_attention(qkv: tuple[Tensor, Tensor, Tensor], mask_BST: Tensor) -> Tensor:
    """[S, B, N, D]: Katharopoulos et al. 2020, eq. 4 with elu(x) + 1, pair by pair."""
    q, k, v = qkv
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    weights = torch.einsum("sbnd,tbnd->bnst", torch.nn.functional.elu(q) + 1, torch.nn.functional.elu(k) + 1)
    weights = weights * mask_BST[:, None]
    total = weights.sum(-1, keepdim=True)
    return torch.einsum("bnst,tbnd->sbnd", weights / torch.where(total > 0, total, 1.0), v)


def gradients(out: Tensor, wanted: list[Tensor]) -> list[Tensor]:
    """Those of a sum with fixed, uneven weights."""
    generator = torch.Generator().manual_seed(7)
    weights = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype)
    return list(torch.autograd.grad((out * weights).sum(), wanted))
