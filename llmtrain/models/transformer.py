"""The model: embeddings, a stack of layers, a head. Plain single-device PyTorch.

Shape suffixes: B micro-batch, S sequence, H hidden, V vocabulary.
"""

from collections.abc import Iterable

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llmtrain.config.model import ModelConfig
from llmtrain.models.attention import Attention, AttentionInputs
from llmtrain.models.caches import LayerCache
from llmtrain.models.cross_entropy import Objective, head_cross_entropy
from llmtrain.models.embeddings import Embeddings
from llmtrain.models.mlp import MLP
from llmtrain.models.norms import build_norm
from llmtrain.models.positions import build_position_bias, rotary_angles
from llmtrain.models.visibility import Visibility
from llmtrain.parallel.draws import Draws, derived_key, dropout_hidden


class Layer(nn.Module):
    """Attention and MLP, each added to the residual; the norm stands before the block or after the sum."""

    def __init__(self, config: ModelConfig, number: int, recompute: str = "none") -> None:
        super().__init__()
        self.pre_norm = config.norm_position == "pre"
        self.dropout = config.dropout
        self.attention_site = derived_key("attention", number)
        self.mlp_site = derived_key("mlp", number)
        self.attention_norm = build_norm(config)
        self.attention = Attention(config, f"decoder.{number}.attention", recompute_kernel=recompute == "selective")
        self.mlp_norm = build_norm(config)
        self.mlp = MLP(config, recompute_activation=recompute == "selective")

    def forward(self, x_SBH: Tensor, inputs: AttentionInputs, cache: LayerCache | None = None) -> Tensor:
        if self.pre_norm:
            attended = self.attention(self.attention_norm(x_SBH), inputs, cache)
            x_SBH = x_SBH + self.dropped(attended, self.attention_site, inputs)
            return x_SBH + self.dropped(self.mlp(self.mlp_norm(x_SBH)), self.mlp_site, inputs)
        attended = self.attention(x_SBH, inputs, cache)
        x_SBH = self.attention_norm(x_SBH + self.dropped(attended, self.attention_site, inputs))
        return self.mlp_norm(x_SBH + self.dropped(self.mlp(x_SBH), self.mlp_site, inputs))

    def dropped(self, x_SBH: Tensor, site: int, inputs: AttentionInputs) -> Tensor:
        return dropout_hidden(x_SBH, self.dropout, site, inputs.draws)


class Stack(nn.Module):
    """Layers by their global number, and the norm that follows the last one where norms stand before blocks."""

    def __init__(self, config: ModelConfig, recompute: str = "none") -> None:
        super().__init__()
        self.recompute_layers = recompute == "full"
        self.layers = nn.ModuleDict({str(n): Layer(config, n, recompute) for n in range(config.num_layers)})
        self.final_norm = build_norm(config) if config.norm_position == "pre" else None

    def forward(self, x_SBH: Tensor, inputs: AttentionInputs, caches: Iterable[LayerCache] | None = None) -> Tensor:
        layer_caches = iter(caches) if caches is not None else None
        for layer in self.layers.values():
            if self.recompute_layers and self.training:
                x_SBH = checkpoint(layer, x_SBH, inputs, use_reentrant=False, preserve_rng_state=False)
            else:
                x_SBH = layer(x_SBH, inputs, None if layer_caches is None else next(layer_caches))
        return x_SBH if self.final_norm is None else self.final_norm(x_SBH)


class Transformer(nn.Module):
    """A causal decoder. A tied head has no weight of its own."""

    def __init__(self, config: ModelConfig, recompute: str = "none") -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.decoder = Stack(config, recompute)
        self.bias = build_position_bias(config, causal=True)
        tied = config.tie_embeddings
        self.head = None if tied else nn.Linear(config.hidden_size, config.padded_vocab_size, bias=False)

    @property
    def head_weight(self) -> Tensor:
        """[V, H], without the rows that pad the vocabulary."""
        weight = self.embeddings.word.weight if self.head is None else self.head.weight
        # A slice of everything would still cost its backward pass a copy of the gradient.
        return weight if self.config.vocabulary == weight.shape[0] else weight[: self.config.vocabulary]

    def forward(
        self,
        tokens_BS: Tensor,
        positions_BS: Tensor,
        segments_BS: Tensor | None = None,
        draws: Draws | None = None,
        caches: Iterable[LayerCache] | None = None,
    ) -> Tensor:
        """Hidden states after the last layer, [S, B, H]. Dropout happens where `draws` are given."""
        x_SBH = self.embeddings(tokens_BS, positions_BS, draws)
        inputs = AttentionInputs(
            rotary=rotary_angles(self.config, positions_BS, x_SBH.dtype) if self.config.position == "rope" else None,
            visible=Visibility(queries_BS=segments_BS, keys_BT=segments_BS),
            bias=self.bias,
            draws=draws,
        )
        return self.decoder(x_SBH, inputs, caches)

    def logits(self, hidden_SBH: Tensor) -> Tensor:
        """[B, S, V] in fp32."""
        return (hidden_SBH.transpose(0, 1) @ self.head_weight.T).float()

    def loss(self, hidden_SBH: Tensor, labels_BS: Tensor, objective: Objective) -> tuple[Tensor, Tensor]:
        """(scaled loss to call backward on, detached sum of the loss over the targets)."""
        return head_cross_entropy(hidden_SBH.flatten(0, 1), self.head_weight, labels_BS.T.flatten(), objective)
