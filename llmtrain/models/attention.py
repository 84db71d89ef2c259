"""Self-attention: projections, positions, and the kernel.

Shape suffixes: S sequence, T keys (S, or more with a cache), B micro-batch, H hidden, N heads, D size of one head.
The number of heads is read off the weights, so that a rank that holds some of the heads runs the same code.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llmtrain.config.model import ModelConfig
from llmtrain.models.positions import Rotary, rotate
from llmtrain.parallel.draws import Draws, Span, derived_key


@dataclass(frozen=True)
class AttentionInputs:
    """What all layers of one forward pass share.

    `allowed_BST` is True where query s may attend to key t; None means causal. `rotary` is None without rotary
    positions. `draws` is None outside training.
    """

    rotary: Rotary | None = None
    allowed_BST: Tensor | None = None
    draws: Draws | None = None


class LayerCache:
    """Keys and values of the positions seen so far, [T, B, N, D], with room for `max_seq_len` positions."""

    def __init__(self, max_seq_len: int) -> None:
        self.max_seq_len = max_seq_len
        self.length = 0
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def extend(self, k_SBND: Tensor, v_SBND: Tensor) -> tuple[Tensor, Tensor]:
        """Append and return everything seen so far."""
        if self.keys is None or self.values is None:
            room = (self.max_seq_len, *k_SBND.shape[1:])
            self.keys, self.values = k_SBND.new_empty(room), v_SBND.new_empty(room)
        end = self.length + k_SBND.shape[0]
        self.keys[self.length : end] = k_SBND
        self.values[self.length : end] = v_SBND
        self.length = end
        return self.keys[:end], self.values[:end]


def causal_mask(num_queries: int, num_keys: int, device: torch.device) -> Tensor:
    """[S, T], True where allowed: the last query sees all keys."""
    return torch.ones(num_queries, num_keys, dtype=torch.bool, device=device).tril(num_keys - num_queries)


def document_mask(segments_BS: Tensor) -> Tensor:
    """[B, S, S]: causal and within one document."""
    same = segments_BS[:, :, None] == segments_BS[:, None, :]
    return same & causal_mask(segments_BS.shape[1], segments_BS.shape[1], segments_BS.device)


def repeated_kv(x_TBND: Tensor, num_heads: int) -> Tensor:
    """Repeat key or value heads so that query head n finds head n // (num_heads / num_kv_heads)."""
    return x_TBND if x_TBND.shape[2] == num_heads else x_TBND.repeat_interleave(num_heads // x_TBND.shape[2], dim=2)


def fused_attention(q_SBND: Tensor, k_TBND: Tensor, v_TBND: Tensor, allowed_BST: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(D)) v through PyTorch's fused kernels; [S, B, N, D]. Causal where no mask is given."""
    causal = allowed_BST is None and q_SBND.shape[0] == k_TBND.shape[0]
    if allowed_BST is not None:
        mask = allowed_BST[:, None]
    elif causal or q_SBND.shape[0] == 1:
        mask = None
    else:
        mask = causal_mask(q_SBND.shape[0], k_TBND.shape[0], q_SBND.device)
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q_SBND, k_TBND, v_TBND))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    return out.permute(2, 0, 1, 3)


class Attention(nn.Module):
    """Multi-head, grouped-query or multi-query attention (Vaswani et al. 2017; Ainslie et al. 2023)."""

    def __init__(self, config: ModelConfig, layer_number: int, recompute_kernel: bool = False) -> None:
        super().__init__()
        self.head_dim = config.head_size
        self.num_heads = config.num_heads
        self.first_head = 0
        self.dropout = config.attention_dropout
        self.dropout_site = derived_key("attention.probabilities", layer_number)
        self.recompute_kernel = recompute_kernel
        self.q = nn.Linear(config.hidden_size, config.num_heads * self.head_dim, bias=config.bias)
        self.k = nn.Linear(config.hidden_size, config.kv_heads * self.head_dim, bias=config.bias)
        self.v = nn.Linear(config.hidden_size, config.kv_heads * self.head_dim, bias=config.bias)
        self.out = nn.Linear(config.num_heads * self.head_dim, config.hidden_size, bias=config.bias)

    def forward(self, x_SBH: Tensor, inputs: AttentionInputs, cache: LayerCache | None = None) -> Tensor:
        q, k, v = (linear(x_SBH).unflatten(-1, (-1, self.head_dim)) for linear in (self.q, self.k, self.v))
        if inputs.rotary is not None:
            q, k = rotate(q, inputs.rotary), rotate(k, inputs.rotary)
        if cache is not None:
            k, v = cache.extend(k, v)
        if self.recompute_kernel and self.training:
            out = checkpoint(self.attend, q, k, v, inputs, use_reentrant=False, preserve_rng_state=False)
        else:
            out = self.attend(q, k, v, inputs)
        return self.out(out.flatten(-2))

    def attend(self, q_SBND: Tensor, k_TBND: Tensor, v_TBND: Tensor, inputs: AttentionInputs) -> Tensor:
        """The kernel: [S, B, N, D]."""
        num_heads = q_SBND.shape[2]
        k, v = repeated_kv(k_TBND, num_heads), repeated_kv(v_TBND, num_heads)
        if self.dropout > 0 and inputs.draws is not None:
            return self.attend_with_dropout(q_SBND, k, v, inputs, inputs.draws)
        return fused_attention(q_SBND, k, v, inputs.allowed_BST)

    def attend_with_dropout(
        self, q_SBND: Tensor, k_TBND: Tensor, v_TBND: Tensor, inputs: AttentionInputs, draws: Draws
    ) -> Tensor:
        """Explicit attention: fused kernels draw random numbers of their own, which no other layout could repeat."""
        num_queries, batch = q_SBND.shape[:2]
        num_keys = k_TBND.shape[0]
        scores_BNST = torch.einsum("sbnd,tbnd->bnst", q_SBND, k_TBND).float() / math.sqrt(self.head_dim)
        allowed = inputs.allowed_BST
        mask = causal_mask(num_queries, num_keys, q_SBND.device) if allowed is None else allowed[:, None]
        probabilities = scores_BNST.masked_fill(~mask, float("-inf")).softmax(-1)
        heads = Span(self.first_head, self.num_heads)
        spans = (Span(0, batch), heads, Span(0, num_queries), Span(0, num_keys))
        keep = draws.keep_mask(self.dropout_site, self.dropout, probabilities.shape, spans)
        kept = torch.where(keep, probabilities * (1 / (1 - self.dropout)), 0.0).to(v_TBND.dtype)
        return torch.einsum("bnst,tbnd->sbnd", kept, v_TBND)
