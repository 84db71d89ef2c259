"""A stack of layers: what each computes, and what all of them share in one forward pass.

Shape suffixes: B micro-batch, S sequence, T the encoder's sequence, H hidden.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llmtrain.config.model import ModelConfig
from llmtrain.models.attention.caches import ChunkCache, MemoryCache, RowCache, RowStates
from llmtrain.models.attention.dense import DenseKeys, DenseSums
from llmtrain.models.attention.multi_head import Attention, AttentionInputs
from llmtrain.models.attention.scoring import Visibility
from llmtrain.models.bottleneck import Bottleneck
from llmtrain.models.compiled_graphs import dropped
from llmtrain.models.experts.dense import DenseMoE
from llmtrain.models.experts.mixture import MoE
from llmtrain.models.pointwise import MLP, Recompute, build_norm
from llmtrain.models.positions import build_position_bias, rotary_angles
from llmtrain.parallel.stateless_random import Draws, site_key

Side = Literal["encoder", "decoder"]

Reports = dict[str, Tensor]
"""The counts of the routers, by their layer's global name; see `RouterReport`."""


class Layer(nn.Module):
    """Attention, in a decoder behind an encoder also cross-attention, and an MLP or experts, each added to the
    residual; the norm stands before the block or after the sum."""

    def __init__(self, config: ModelConfig, side: Side, number: int, recompute: Recompute = "none") -> None:
        super().__init__()
        site, selective = f"{side}.{number}", recompute == "selective"
        self.pre_norm = config.norm_position == "pre"
        self.dropout = config.dropout
        self.attention_site, self.mlp_site = site_key(site, "attention"), site_key(site, "mlp")
        self.cross_attention_site = site_key(site, "cross_attention")
        self.attention_norm = build_norm(config)
        self.attention = Attention(config, f"{site}.attention", recompute_kernel=selective)
        self.cross_attention_norm, self.cross_attention = None, None
        if config.family == "encoder_decoder" and side == "decoder":
            self.cross_attention_norm = build_norm(config)
            self.cross_attention = Attention(config, f"{site}.cross_attention", selective, cross=True)
        self.mlp_norm = build_norm(config)
        self.mlp: MLP | None = None
        self.moe: MoE | DenseMoE | None = None
        if config.has_experts(number):
            self.moe = MoE(config, f"{site}.moe", recompute=recompute)
        else:
            self.mlp = MLP(config, recompute=recompute)
        self.attention_adapter: Bottleneck | None = None
        self.mlp_adapter: Bottleneck | None = None

    def forward(
        self, x_SBH: Tensor, inputs: "LayerInputs", cache: "LayerCaches | None" = None
    ) -> tuple[Tensor, Tensor | None]:
        """(output, its router's report: None without experts)."""
        own, cross = (None, None) if cache is None else (cache.own, cache.cross)
        draws, report = inputs.attention.draws, None
        y_SBH = self.attention(self._before(self.attention_norm, x_SBH), inputs.attention, own)
        y_SBH = dropped(y_SBH, self.dropout, self.attention_site, draws)
        x_SBH = self._added(self.attention_norm, x_SBH, y_SBH, self.attention_adapter)
        if self.cross_attention is not None and self.cross_attention_norm is not None and inputs.cross is not None:
            y_SBH = self._before(self.cross_attention_norm, x_SBH)
            y_SBH = self.cross_attention(y_SBH, inputs.cross, cross, inputs.memory_TBH)
            y_SBH = dropped(y_SBH, self.dropout, self.cross_attention_site, draws)
            x_SBH = self._added(self.cross_attention_norm, x_SBH, y_SBH)
        y_SBH = self._before(self.mlp_norm, x_SBH)
        if self.moe is not None:
            y_SBH, report = self.moe(y_SBH, inputs.valid_BS, draws, inputs.balance)
        elif self.mlp is not None:
            y_SBH = self.mlp(y_SBH, draws)
        y_SBH = dropped(y_SBH, self.dropout, self.mlp_site, draws)
        return self._added(self.mlp_norm, x_SBH, y_SBH, self.mlp_adapter), report

    def _before(self, norm: nn.Module, x_SBH: Tensor) -> Tensor:
        return norm(x_SBH) if self.pre_norm else x_SBH

    def _added(self, norm: nn.Module, x_SBH: Tensor, y_SBH: Tensor, adapter: Bottleneck | None = None) -> Tensor:
        """The residual stream with the output of a block, and with what an adapter makes of either."""
        sum_SBH = x_SBH + y_SBH
        if adapter is None:
            return sum_SBH if self.pre_norm else norm(sum_SBH)
        if adapter.reads_sum:
            y_SBH = sum_SBH if self.pre_norm else norm(sum_SBH)
        sum_SBH = sum_SBH + adapter(y_SBH)
        return sum_SBH if self.pre_norm else norm(sum_SBH)


@dataclass(frozen=True)
class LayerCaches:
    """The memory of one layer in decoding: of self-attention, and behind an encoder of cross-attention."""

    own: ChunkCache | RowCache | RowStates | DenseKeys | DenseSums
    cross: MemoryCache | RowCache | DenseKeys | None = None


@dataclass(frozen=True)
class LayerInputs:
    """The inputs that all layers of one stack share in one forward pass.

    `cross` and `memory_TBH`, the encoder's output, are for cross-attention. `valid_BS` is False on padding, which no
    expert does; None: there is no padding. `balance` is the factor of the balancing losses' gradients.
    """

    attention: AttentionInputs
    cross: AttentionInputs | None = None
    memory_TBH: Tensor | None = None
    valid_BS: Tensor | None = None
    balance: float = 0.0


class Stack(nn.Module):
    """Layers by their global number, the norm that follows the last one where norms stand before blocks, and the
    position bias that the layers share."""

    def __init__(self, config: ModelConfig, side: Side, recompute: Recompute = "none") -> None:
        super().__init__()
        self.config, self.side = config, side
        self.recompute_layers = recompute == "full"
        num_layers = config.encoder_layers if side == "encoder" else config.decoder_layers
        self.layers = nn.ModuleDict({str(n): Layer(config, side, n, recompute) for n in range(num_layers)})
        self.final_norm = build_norm(config) if config.norm_position == "pre" else None
        self.position_bias = build_position_bias(config, causal=side == "decoder")

    def inputs(self, visible: Visibility, positions_BS: Tensor, x_SBH: Tensor, run: "Pass") -> LayerInputs:
        """The layers' shared inputs, without those from an encoder. Positions are those inside of attention."""
        rotary = rotary_angles(self.config, positions_BS, x_SBH.dtype) if self.config.position == "rope" else None
        valid_BS = None if visible.queries_BS is None else visible.queries_BS >= 0
        attention = AttentionInputs(rotary, visible, self.position_bias, run.draws)
        return LayerInputs(attention, valid_BS=valid_BS, balance=run.balance)

    def forward(
        self, x_SBH: Tensor, inputs: LayerInputs, caches: Iterable[LayerCaches] | None = None
    ) -> tuple[Tensor, Reports]:
        layer_caches = iter(caches) if caches is not None else None
        reports = {}
        for number, layer in self.layers.items():
            if self.recompute_layers and self.training:
                # Draws are hashes: a recomputed layer draws the same without any saved random state.
                x_SBH, report = checkpoint(layer, x_SBH, inputs, use_reentrant=False, preserve_rng_state=False)
            else:
                x_SBH, report = layer(x_SBH, inputs, None if layer_caches is None else next(layer_caches))
            if report is not None:
                reports[f"{self.side}.layers.{number}"] = report
        return x_SBH if self.final_norm is None else self.final_norm(x_SBH), reports


@dataclass(frozen=True)
class Pass:
    """The settings of a forward pass: its draws (None: no dropout, no noise), and the factor of the balancing losses'
    gradients."""

    draws: Draws | None = None
    balance: float = 0.0


def with_memory(inputs: LayerInputs, memory_TBH: Tensor, segments_BT: Tensor | None) -> LayerInputs:
    """The decoder's inputs with an encoder's output, all of which but padding is seen by every position."""
    cross = AttentionInputs(visible=Visibility(False, keys_BT=segments_BT), draws=inputs.attention.draws)
    return replace(inputs, cross=cross, memory_TBH=memory_TBH)
