"""Attention: projections, norms, positions, and the kernel that the kind of attention and the device call for.

Shape suffixes: S queries, T keys, B micro-batch, H hidden, N heads, D size of one head.
The number of heads is read off the weights, so that a rank that holds some of the heads runs the same code.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llmtrain.config.model import ModelConfig
from llmtrain.models.attention.blockwise import blockwise_attention
from llmtrain.models.attention.caches import ChunkCache, LayerCache, MemoryCache, RowCache, RowStates
from llmtrain.models.attention.dense import DenseKeys, DenseSums
from llmtrain.models.attention.flex_kernel import can_flex, flex_kernel
from llmtrain.models.attention.joint_product import JointProduct, find_joint, joint_outputs, put_side_by_side
from llmtrain.models.attention.linear import linear_attention
from llmtrain.models.attention.patterns import PATTERNS, Extent, Full, Strided
from llmtrain.models.attention.ring import ring_attention
from llmtrain.models.attention.scoring import ProbabilityDropout, Scoring, Visibility, repeated_kv, scores_by_distance
from llmtrain.models.low_rank import projected
from llmtrain.models.pointwise import RMSNorm
from llmtrain.models.positions import PositionBias, Rotary, at_least_fp32, rotate
from llmtrain.parallel.ring import Ring
from llmtrain.parallel.stateless_random import Draws, Span, site_key


@dataclass(frozen=True, eq=False)
class AttentionInputs:
    """The inputs of attention that all layers of one forward pass share.

    `rotary` is None without rotary positions, `bias` without scores by position, `draws` outside of training.
    """

    rotary: Rotary | None = None
    visible: Visibility = field(default_factory=Visibility)
    bias: PositionBias | None = None
    draws: Draws | None = None


def fused_attention(q_SBND: Tensor, k_TBND: Tensor, v_TBND: Tensor, scoring: Scoring) -> Tensor:
    """softmax(scale q k^T) v, [S, B, N, D]; no mask is made where all, or all earlier, keys are seen."""
    visible, (num_queries, num_keys) = scoring.visible, (q_SBND.shape[0], k_TBND.shape[0])
    ordered = visible.causal and visible.prefix_B is None
    maskless = visible.keys_BT is None and (not visible.causal or (ordered and num_queries in (1, num_keys)))
    # On a GPU the kernels without a mask find the head of a group by themselves: keys and values are not copied.
    grouped = maskless and q_SBND.is_cuda and q_SBND.shape[2] != k_TBND.shape[2]
    k, v = (x if grouped else repeated_kv(x, q_SBND.shape[2]) for x in (k_TBND, v_TBND))
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q_SBND, k, v))
    if maskless:
        is_causal = visible.causal and num_queries > 1
        out = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, scale=scoring.scale, enable_gqa=grouped)
        return out.permute(2, 0, 1, 3)
    mask_BST = visible.allowed(num_queries, num_keys, q.device)
    assert mask_BST is not None, "something is left out"
    blind_BS1 = None
    if visible.may_see_nothing:
        # A softmax over nothing is no number, and its gradient neither: such a query sees all, and is then forgotten.
        blind_BS1 = ~mask_BST.any(-1, keepdim=True)
        mask_BST = mask_BST | blind_BS1
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask_BST[:, None], scale=scoring.scale)
    if blind_BS1 is not None:
        out = out.masked_fill(blind_BS1[:, None], 0.0)
    return out.permute(2, 0, 1, 3)


KernelName = Literal["fused", "blockwise", "flex"]

KERNELS: dict[KernelName, Callable[[Tensor, Tensor, Tensor, Scoring], Tensor]] = {
    "fused": fused_attention,
    "blockwise": blockwise_attention,
    "flex": flex_kernel,
}


def kernel_for(q_SBND: Tensor, k_TBND: Tensor, scoring: Scoring, on_gpu: bool) -> KernelName:
    """The fastest kernel that computes this: PyTorch's fused ones know no pattern and nothing between score and weight;
    FlexAttention knows both, on GPUs; the blockwise one knows everything, everywhere.

    Documents, padding and prefixes are a mask [S, T] to the fused ones. On a GPU that costs them the kernels that skip
    what is masked, so FlexAttention, which knows them as a rule, takes over there.
    """
    can_be_flex = on_gpu and can_flex(q_SBND, k_TBND, scoring)
    added = (scoring.softcap, scoring.by_distance_NR, scoring.sinks_N, scoring.dropout)
    masked = scoring.visible.keys_BT is not None or scoring.visible.prefix_B is not None
    if isinstance(scoring.pattern, Full) and all(part is None for part in added) and not (masked and can_be_flex):
        return "fused"
    # A stride leaves something of every block of FlexAttention's, so that it would save nothing there.
    if can_be_flex and not isinstance(scoring.pattern, Strided):
        return "flex"
    return "blockwise"


class Attention(nn.Module):
    """Multi-head, grouped-query or multi-query attention (Vaswani et al. 2017; Ainslie et al. 2023).

    Self-attention of the configured kind; `cross`: full attention to a memory, without positions and sinks.
    """

    def __init__(self, config: ModelConfig, site: str, recompute_kernel: bool = False, cross: bool = False) -> None:
        super().__init__()
        self.cross = cross
        self.head_dim = config.head_size
        self.num_heads = config.num_heads
        self.first_head = 0
        """First of the global heads that the kernel computes on this rank."""
        self.tensor_first_head = 0
        """First of the global heads whose weights this rank holds."""
        self.kind = "full" if cross else config.attention.kind
        self.pattern = PATTERNS[self.kind](config.attention)
        self.scale = config.attention.scale or 1 / math.sqrt(self.head_dim)
        self.softcap = config.attention.softcap
        self.dropout = config.attention_dropout
        self.dropout_site = site_key(site, "probabilities")
        self.recompute_kernel = recompute_kernel
        self.ring: Ring | None = None
        """The ranks that hold the other parts of the sequence, where keys and values travel between them."""
        self.q = nn.Linear(config.hidden_size, config.num_heads * self.head_dim, bias=config.bias)
        self.k = nn.Linear(config.hidden_size, config.kv_heads * self.head_dim, bias=config.bias)
        self.v = nn.Linear(config.hidden_size, config.kv_heads * self.head_dim, bias=config.bias)
        self.out = nn.Linear(config.num_heads * self.head_dim, config.hidden_size, bias=config.bias)
        self.joint: tuple[Tensor, list[int]] | None = None
        """The weights of q, k and v as one, where engines let them be multiplied together: see joint_product.py."""
        self.joint_product: Callable[..., tuple[Tensor, ...]] = JointProduct.apply
        self.q_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else None
        has_sinks = config.attention.sinks and not cross
        self.sinks = nn.Parameter(torch.empty(config.num_heads)) if has_sinks else None

    def forward(
        self,
        x_SBH: Tensor,
        inputs: AttentionInputs,
        cache: LayerCache | None = None,
        memory_TBH: Tensor | None = None,
    ) -> Tensor:
        """[S, B, H]. Cross-attention needs the memory, but where its cache has seen it."""
        if self.cross:
            q = self.heads_of(projected(self.q, x_SBH, inputs.draws), self.q_norm)
            if isinstance(cache, RowCache | DenseKeys):
                return self.projected_out(cache.attended(q, partial(self.scoring, inputs=inputs)), inputs)
            k, v = self.keys_and_values_of_memory(memory_TBH, inputs.draws, cache)
        else:
            linears = (self.q, self.k, self.v)
            if self.joint:
                outputs = joint_outputs(x_SBH, *self.joint, linears, self.joint_product)
            else:
                outputs = [projected(each, x_SBH, inputs.draws) for each in linears]
            q, k, v = map(self.heads_of, outputs, (self.q_norm, self.k_norm, None))
            if inputs.rotary is not None:
                q, k = rotate(q, inputs.rotary), rotate(k, inputs.rotary)
        if isinstance(cache, RowStates | DenseSums):
            out = cache.attended(q, *self.repeated(q, k, v), inputs.visible)
        elif isinstance(cache, RowCache | DenseKeys):
            cache.append(k, v)
            out = cache.attended(q, partial(self.scoring, inputs=inputs))
        else:
            if isinstance(cache, ChunkCache):
                k, v = cache.extend(k, v)
            # A ring keeps little more than what goes into it, and would have to go round again.
            if self.recompute_kernel and self.training and self.ring is None:
                # Draws are hashes: no random state needs to be kept for the second pass.
                out = checkpoint(self.attend, q, k, v, inputs, use_reentrant=False, preserve_rng_state=False)
            else:
                out = self.attend(q, k, v, inputs)
        return self.projected_out(out, inputs)

    def projected_out(self, out_SBND: Tensor, inputs: AttentionInputs) -> Tensor:
        return projected(self.out, out_SBND.flatten(-2), inputs.draws)

    def heads_of(self, output: Tensor, norm: RMSNorm | None) -> Tensor:
        """[S, B, N, D] of what a linear has put out."""
        heads = output.unflatten(-1, (-1, self.head_dim))
        return heads if norm is None else norm(heads)

    def keys_and_values_of_memory(
        self, memory_TBH: Tensor | None, draws: Draws | None, cache: LayerCache | None
    ) -> tuple[Tensor, Tensor]:
        def computed() -> tuple[Tensor, Tensor]:
            assert memory_TBH is not None, "cross-attention needs a memory"
            keys, values = (projected(linear, memory_TBH, draws) for linear in (self.k, self.v))
            return self.heads_of(keys, self.k_norm), self.heads_of(values, None)

        return cache.kept(computed) if isinstance(cache, MemoryCache) else computed()

    def repeated(self, q_SBND: Tensor, k_TBND: Tensor, v_TBND: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values with as many heads as the queries."""
        return repeated_kv(k_TBND, q_SBND.shape[2]), repeated_kv(v_TBND, q_SBND.shape[2])

    def attend(self, q_SBND: Tensor, k_TBND: Tensor, v_TBND: Tensor, inputs: AttentionInputs) -> Tensor:
        """From rotated queries and keys to weighted values: [S, B, N, D]."""
        if self.kind == "linear":
            return linear_attention(q_SBND, *self.repeated(q_SBND, k_TBND, v_TBND), inputs.visible)
        scoring = self.scoring(q_SBND, k_TBND, inputs)
        if self.ring is not None:
            return ring_attention(q_SBND, k_TBND, v_TBND, scoring, self.ring)
        kernel = KERNELS[kernel_for(q_SBND, k_TBND, scoring, q_SBND.is_cuda)]
        return kernel(q_SBND, k_TBND, v_TBND, scoring)

    def scoring(self, q_SBND: Tensor, k_TBND: Tensor, inputs: AttentionInputs) -> Scoring:
        """The scoring of this layer for the whole sequence, with the weights of the heads at hand."""
        ranks = 1 if self.ring is None else self.ring.size
        heads = range(self.first_head, self.first_head + q_SBND.shape[2])
        by_distance = sinks = dropout = None
        if inputs.bias is not None and not self.cross:
            extent = Extent(q_SBND.shape[0] * ranks, k_TBND.shape[0] * ranks, inputs.visible.looks_ahead)
            by_distance = scores_by_distance(inputs.bias, extent, heads, q_SBND.device)
        if self.sinks is not None:
            start = heads.start - self.tensor_first_head
            sinks = at_least_fp32(self.sinks[start : start + len(heads)])
        if self.dropout > 0 and inputs.draws is not None:
            span = Span(heads.start, self.num_heads)
            dropout = ProbabilityDropout(self.dropout, self.dropout_site, inputs.draws, span)
        return Scoring(self.pattern, inputs.visible, self.scale, self.softcap, by_distance, sinks, dropout)


def join_projections(model: nn.Module, move: bool) -> None:
    """Let self-attention make queries, keys and values in one product, where their weights lie side by side.

    With `move`, what lies elsewhere is put there first. Weights must not be moved by others afterwards.
    """
    for module in model.modules():
        if isinstance(module, Attention) and not module.cross:
            linears = (module.q, module.k, module.v)
            if move:
                put_side_by_side(linears)
            module.joint = find_joint(linears)
