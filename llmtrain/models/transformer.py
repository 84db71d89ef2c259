"""The model: embeddings, one or two stacks of layers, a head. Plain single-device PyTorch.

Shape suffixes: B micro-batch, S sequence, T the encoder's sequence, H hidden, V vocabulary.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llmtrain.config.model import ModelConfig
from llmtrain.models.attention.caches import KeyValueCache, MemoryCache, StateCache, build_cache
from llmtrain.models.attention.multi_head import Attention, AttentionInputs
from llmtrain.models.attention.visibility import Visibility
from llmtrain.models.cross_entropy import Objective, head_cross_entropy
from llmtrain.models.embeddings import Embeddings
from llmtrain.models.experts.mixture import MoE
from llmtrain.models.head import MlmHead
from llmtrain.models.mlp import MLP
from llmtrain.models.norms import build_norm
from llmtrain.models.positions import build_position_bias, rotary_angles
from llmtrain.parallel.stateless_random import Draws, dropout_hidden, site_key

Side = Literal["encoder", "decoder"]


@dataclass(frozen=True)
class ModelInputs:
    """Tokens and who sees whom, for the fields of the same names of a batch; see llmtrain/values/batch.py."""

    tokens_BS: Tensor
    positions_BS: Tensor
    segments_BS: Tensor | None = None
    prefix_B: Tensor | None = None
    encoder_tokens_BT: Tensor | None = None
    encoder_segments_BT: Tensor | None = None


Reports = dict[str, Tensor]
"""What the routers of layers with experts have counted, by the layer's global name; see `RouterReport`."""


class Layer(nn.Module):
    """Attention, in a decoder behind an encoder also cross-attention, and an MLP or experts, each added to the
    residual; the norm stands before the block or after the sum."""

    def __init__(self, config: ModelConfig, side: Side, number: int, recompute: str = "none") -> None:
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
        self.mlp, self.moe = None, None
        if config.has_experts(number):
            self.moe = MoE(config, f"{site}.moe", recompute_activation=selective)
        else:
            self.mlp = MLP(config, recompute_activation=selective)

    def forward(
        self, x_SBH: Tensor, inputs: "LayerInputs", cache: "LayerCaches | None" = None
    ) -> tuple[Tensor, Tensor | None]:
        """(output, its router's report: None without experts)."""
        own, cross = (None, None) if cache is None else (cache.own, cache.cross)
        draws, report = inputs.attention.draws, None
        y_SBH = self.attention(self._before(self.attention_norm, x_SBH), inputs.attention, own)
        x_SBH = self._added(self.attention_norm, x_SBH, y_SBH, self.attention_site, draws)
        if self.cross_attention is not None and self.cross_attention_norm is not None and inputs.cross is not None:
            y_SBH = self._before(self.cross_attention_norm, x_SBH)
            y_SBH = self.cross_attention(y_SBH, inputs.cross, cross, inputs.memory_TBH)
            x_SBH = self._added(self.cross_attention_norm, x_SBH, y_SBH, self.cross_attention_site, draws)
        y_SBH = self._before(self.mlp_norm, x_SBH)
        if self.moe is not None:
            y_SBH, report = self.moe(y_SBH, inputs.valid_BS, draws, inputs.balance)
        elif self.mlp is not None:
            y_SBH = self.mlp(y_SBH)
        return self._added(self.mlp_norm, x_SBH, y_SBH, self.mlp_site, draws), report

    def _before(self, norm: nn.Module, x_SBH: Tensor) -> Tensor:
        return norm(x_SBH) if self.pre_norm else x_SBH

    def _added(self, norm: nn.Module, x_SBH: Tensor, y_SBH: Tensor, site: Tensor, draws: Draws | None) -> Tensor:
        x_SBH = x_SBH + dropout_hidden(y_SBH, self.dropout, site, draws)
        return x_SBH if self.pre_norm else norm(x_SBH)


@dataclass(frozen=True)
class LayerCaches:
    """What one layer remembers in decoding: of self-attention, and behind an encoder of cross-attention."""

    own: KeyValueCache | StateCache
    cross: MemoryCache


def build_caches(config: ModelConfig, max_seq_len: int) -> list[LayerCaches]:
    """Caches for all layers of the decoder, with room for `max_seq_len` positions."""
    return [LayerCaches(build_cache(config, max_seq_len), MemoryCache()) for _ in range(config.decoder_layers)]


@dataclass(frozen=True)
class LayerInputs:
    """What all layers of one stack share in one forward pass. `cross` and `memory_TBH`, the encoder's output, are those
    of cross-attention. `valid_BS` is False on padding, which no expert does; None: there is none. `balance` is what
    the gradients of the balancing losses are multiplied by."""

    attention: AttentionInputs
    cross: AttentionInputs | None = None
    memory_TBH: Tensor | None = None
    valid_BS: Tensor | None = None
    balance: float = 0.0


class Stack(nn.Module):
    """Layers by their global number, the norm that follows the last one where norms stand before blocks, and the
    position bias that the layers share."""

    def __init__(self, config: ModelConfig, side: Side, recompute: str = "none") -> None:
        super().__init__()
        self.config, self.side = config, side
        self.recompute_layers = recompute == "full"
        num_layers = config.encoder_layers if side == "encoder" else config.decoder_layers
        self.layers = nn.ModuleDict({str(n): Layer(config, side, n, recompute) for n in range(num_layers)})
        self.final_norm = build_norm(config) if config.norm_position == "pre" else None
        self.position_bias = build_position_bias(config, causal=side == "decoder")

    def inputs(self, visible: Visibility, positions_BS: Tensor, x_SBH: Tensor, run: "Pass") -> LayerInputs:
        """What the layers share, but for what comes from an encoder. Positions are those inside of attention."""
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
                x_SBH, report = checkpoint(layer, x_SBH, inputs, use_reentrant=False, preserve_rng_state=False)
            else:
                x_SBH, report = layer(x_SBH, inputs, None if layer_caches is None else next(layer_caches))
            if report is not None:
                reports[f"{self.side}.layers.{number}"] = report
        return x_SBH if self.final_norm is None else self.final_norm(x_SBH), reports


@dataclass(frozen=True)
class Pass:
    """How a model is run: with which draws (None: without dropout and noise), and what the gradients of balancing
    losses are multiplied by."""

    draws: Draws | None = None
    balance: float = 0.0


class Transformer(nn.Module):
    """A decoder, an encoder, or both. A tied head has no weight of its own."""

    def __init__(self, config: ModelConfig, recompute: str = "none") -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.encoder = Stack(config, "encoder", recompute) if config.encoder_layers else None
        self.decoder = Stack(config, "decoder", recompute) if config.decoder_layers else None
        self.mlm = MlmHead(config) if config.head == "mlm" else None
        tied = config.tie_embeddings
        self.head = None if tied else nn.Linear(config.hidden_size, config.padded_vocab_size, bias=False)

    @property
    def stacks(self) -> Sequence[Stack]:
        """Those that there are, in the order in which data flows."""
        return [stack for stack in (self.encoder, self.decoder) if stack is not None]

    @property
    def head_weight(self) -> Tensor:
        """[V, H], without the rows that pad the vocabulary."""
        weight = self.embeddings.word.weight if self.head is None else self.head.weight
        # A slice of everything would still cost its backward pass a copy of the gradient.
        return weight if self.config.vocabulary == weight.shape[0] else weight[: self.config.vocabulary]

    def forward(
        self,
        inputs: ModelInputs,
        run: Pass | None = None,
        caches: Iterable[LayerCaches] | None = None,
        memory_TBH: Tensor | None = None,
    ) -> tuple[Tensor, Reports]:
        """Hidden states for the head, [S, B, H], and what routers have counted.

        `memory_TBH` is what `encode` has returned, where the encoder need not run again.
        """
        run, reports = run or Pass(), {}
        if self.encoder is not None and self.decoder is not None and memory_TBH is None:
            memory_TBH, reports = self.encode(inputs, run)
        stack = self.stacks[-1]
        x_SBH = self.embeddings(inputs.tokens_BS, inputs.positions_BS, run.draws, stack.side)
        shared = stack.inputs(main_visibility(self.config, inputs), inputs.positions_BS, x_SBH, run)
        if memory_TBH is not None:
            shared = with_memory(shared, memory_TBH, inputs.encoder_segments_BT)
        x_SBH, more = stack(x_SBH, shared, caches)
        return self.before_head(x_SBH), {**reports, **more}

    def encode(self, inputs: ModelInputs, run: Pass) -> tuple[Tensor, Reports]:
        """The output of an encoder-decoder's encoder, [T, B, H], and what its routers have counted."""
        assert self.encoder is not None and inputs.encoder_tokens_BT is not None
        positions_BT = counted_positions(inputs.encoder_tokens_BT)
        x_TBH = self.embeddings(inputs.encoder_tokens_BT, positions_BT, run.draws, "encoder")
        visible = encoder_visibility(inputs.encoder_segments_BT)
        return self.encoder(x_TBH, self.encoder.inputs(visible, positions_BT, x_TBH, run))

    def before_head(self, x_SBH: Tensor) -> Tensor:
        """What stands between the last layer and the matrix of the head."""
        x_SBH = x_SBH if self.mlm is None else self.mlm(x_SBH)
        return x_SBH * self.config.hidden_size**-0.5 if self.config.scaled_head else x_SBH

    def logits(self, hidden_SBH: Tensor) -> Tensor:
        """[B, S, V] in fp32."""
        logits_BSV = (hidden_SBH.transpose(0, 1) @ self.head_weight.T).float()
        return logits_BSV if self.mlm is None else logits_BSV + self.mlm.bias[: self.config.vocabulary].float()

    def loss(self, hidden_SBH: Tensor, labels_BS: Tensor, objective: Objective) -> tuple[Tensor, Tensor]:
        """(scaled loss to call backward on, detached sum of the loss over the targets)."""
        bias_V = None if self.mlm is None else self.mlm.bias[: self.config.vocabulary]
        labels_T = labels_BS.T.flatten()
        return head_cross_entropy(hidden_SBH.flatten(0, 1), self.head_weight, labels_T, objective, bias_V)


def main_visibility(config: ModelConfig, inputs: ModelInputs) -> Visibility:
    """Who sees whom in the stack that the head stands on."""
    return Visibility(config.family != "encoder", inputs.segments_BS, inputs.segments_BS, inputs.prefix_B)


def encoder_visibility(segments_BT: Tensor | None) -> Visibility:
    """Who sees whom in an encoder-decoder's encoder."""
    return Visibility(False, segments_BT, segments_BT)


def with_memory(inputs: LayerInputs, memory_TBH: Tensor, segments_BT: Tensor | None) -> LayerInputs:
    """The decoder's inputs with an encoder's output, all of which but padding is seen by every position."""
    cross = AttentionInputs(visible=Visibility(False, keys_BT=segments_BT), draws=inputs.attention.draws)
    return replace(inputs, cross=cross, memory_TBH=memory_TBH)


def counted_positions(tokens_BT: Tensor) -> Tensor:
    """0, 1, 2, ... for each sample."""
    return torch.arange(tokens_BT.shape[1], device=tokens_BT.device).expand(tokens_BT.shape)
