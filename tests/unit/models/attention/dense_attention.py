"""Attention from its definitions: the whole square of scores, a mask from the documented words, no pieces."""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from llmtrain.config.attention import AttentionConfig
from llmtrain.models.attention.patterns import drawn_blocks
from llmtrain.models.attention.scoring import Visibility

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


@cache
def pattern_mask(config: AttentionConfig, num_queries: int, num_keys: int) -> Tensor:
    """[S, T], pair by pair."""
    places = range(num_keys - num_queries, num_keys)
    return torch.tensor([[pair_allowed(config, s, t) for t in range(num_keys)] for s in places])


def visible_mask(visible: Visibility, b: int, num_queries: int, num_keys: int) -> Tensor:
    """[S, T] of one sample, pair by pair."""
    prefix = 0 if visible.prefix_B is None else int(visible.prefix_B[b])
    keys = None if visible.keys_BT is None else visible.keys_BT[b].tolist()
    queries = None if visible.queries_BS is None else visible.queries_BS[b].tolist()

    def seen(query: int, t: int) -> bool:
        if visible.causal and t > query + num_keys - num_queries and t >= prefix:
            return False
        return keys is None or (keys[t] >= 0 if queries is None else keys[t] == queries[query])

    return torch.tensor([[seen(s, t) for t in range(num_keys)] for s in range(num_queries)])


def dense_mask(config: AttentionConfig, visible: Visibility, batch: int, num_queries: int, num_keys: int) -> Tensor:
    """[B, S, T]."""
    seen_BST = torch.stack([visible_mask(visible, b, num_queries, num_keys) for b in range(batch)])
    return seen_BST & pattern_mask(config, num_queries, num_keys)


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
