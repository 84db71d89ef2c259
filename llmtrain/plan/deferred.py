"""What is held of a micro-batch between its backward pass and its weight gradients, under the zero-bubble schedule.

Of every product of a layer that is its input and the gradient of its output (Qi et al. 2023, table 1). No torch.
"""

from llmtrain.config.model import ModelConfig
from llmtrain.config.parameters import expert_ffn_size
from llmtrain.config.schema import RunConfig
from llmtrain.config.sequence_lengths import Lengths
from llmtrain.parallel.layout import Layout


def deferred_elements(config: RunConfig, layout: Layout, lengths: Lengths) -> float:
    """Numbers of one sample, of all layers, on the ranks of a context group together.

    Recomputation does not change it: what is computed again in the backward pass is then held.
    """
    model, encoded = config.model, lengths.encoder or lengths.main
    held = encoded * model.encoder_layers * _layer_elements(model, layout, crosses=False)
    crosses = model.family == "encoder_decoder"
    return held + lengths.main * model.decoder_layers * _layer_elements(model, layout, crosses)


def _layer_elements(model: ModelConfig, layout: Layout, crosses: bool) -> float:
    """Of each token. What is as wide as the residual is whole on every tensor rank inside of a block."""
    queries, keys = model.num_heads * model.head_size, model.kv_heads * model.head_size
    # The common input of queries, keys and values, and the output's gradient; the gradients of the three, and the
    # output's input.
    attention = 2 * model.hidden_size + (2 * queries + 2 * keys) / layout.tensor
    return attention * (2 if crosses else 1) + _mlp_elements(model, layout)


def _mlp_elements(model: ModelConfig, layout: Layout) -> float:
    """Of an average layer: the same of one or two matrices in and one out."""
    wide = 3 if model.gated else 2
    plain = 2 * model.hidden_size + wide * model.ffn_size / layout.tensor
    if model.moe is None:
        return plain
    num_layers = model.decoder_layers or model.encoder_layers
    share = sum(model.has_experts(layer) for layer in range(num_layers)) / num_layers
    expert = 2 * model.hidden_size + wide * expert_ffn_size(model) / layout.tensor
    return (1 - share) * plain + share * expert * (model.moe.choices + model.moe.num_shared_experts)
