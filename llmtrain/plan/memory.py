"""How much memory a run takes on each rank, by arithmetic: what it holds all the time, and what a step adds. No torch.

Both are estimates: layers are taken as split evenly, and Python, PyTorch and communication need some beside them.
"""

from dataclasses import dataclass

from llmtrain.config.model import ModelConfig
from llmtrain.config.parameters import declare_parameters, expert_ffn_size, is_frozen, num_elements
from llmtrain.config.schema import RunConfig
from llmtrain.config.sequence_lengths import Lengths
from llmtrain.optim.table import row_of
from llmtrain.parallel.layout import Layout

LOGITS_BYTES = 8
"""Of each logit in a chunk of the output layer: its value and its gradient in fp32."""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one rank. `held` are weights, gradients, masters and moments; `activations` what a step keeps between
    forward and backward; `logits` a chunk of the output layer."""

    held: int
    activations: int
    logits: int


def plan_memory(config: RunConfig, layout: Layout, lengths: Lengths) -> MemoryPlan:
    """The estimate for a rank of the first pipeline stage, which holds the most. Needs model.vocab_size."""
    return MemoryPlan(
        round(held_bytes(config, layout)),
        round(activation_bytes(config, layout, lengths)),
        _logits_bytes(config, layout, lengths),
    )


def held_bytes(config: RunConfig, layout: Layout) -> float:
    """Weights, their gradients, fp32 masters and the optimizer's moments of one rank."""
    shards = layout.data * layout.context
    stage = config.engine.zero_stage
    low = config.train.precision != "fp32"
    weights, gradients = (2, 4) if low else (4, 4)
    row = row_of(config.optim)
    optimizer = row.stored_bytes if low else row.state_bytes  # in fp32 the weights are their own masters
    optimizer = 0 if config.engine.offload != "none" else optimizer / (shards if stage >= 1 else 1)
    weights /= shards if stage >= 3 else 1
    trained = gradients / (shards if stage >= 2 else 1) + optimizer
    held = 0.0
    for name, parameter in declare_parameters(config.model).items():
        size = num_elements(parameter, config.model) / (layout.expert if parameter.expert else 1)
        held += size * (weights if is_frozen(name, config.optim.freeze) else weights + trained)
    return held / (layout.tensor * layout.pipeline)


def activation_bytes(config: RunConfig, layout: Layout, lengths: Lengths, per_norm: int = 2) -> float:
    """What all micro-batches under way keep for the backward pass on a rank of the first pipeline stage.

    `per_norm` is how many tensors as wide as the residual a norm and its input take: 2 where one kernel does it.
    """
    model, train = config.model, config.train
    num_bytes = 4 if train.precision == "fp32" else 2
    encoded = lengths.encoder or lengths.main  # of an encoder alone, the sample
    kept = encoded * model.encoder_layers * _layer_elements(config, layout, False, per_norm)
    kept += lengths.main * model.decoder_layers * _layer_elements(config, layout, True, per_norm)
    if train.recompute == "full":  # one layer at a time is there in whole
        plain = config.with_keys({"train.recompute": "none"})
        kept += max(lengths.main, lengths.encoder) * _layer_elements(plain, layout, True, per_norm) * layout.pipeline
    micro_batches = train.global_batch_size // (train.micro_batch_size * layout.data)
    under_way = min(layout.pipeline, micro_batches)
    return kept / layout.pipeline * under_way * train.micro_batch_size * num_bytes / layout.context


def _layer_elements(config: RunConfig, layout: Layout, is_decoder: bool, per_norm: int) -> float:
    """Numbers that a layer keeps of each token: inputs of norms and of matrix products, queries, keys and values."""
    model, selective = config.model, config.train.recompute == "selective"
    hidden = model.hidden_size / (layout.tensor if layout.sequence else 1)
    if config.train.recompute == "full":
        return hidden
    keys = model.kv_heads if selective else model.num_heads  # the kernel has them repeated
    attention = per_norm * hidden + 2 * (model.num_heads + keys) * model.head_size / layout.tensor
    crosses = model.family == "encoder_decoder" and is_decoder
    return attention * (2 if crosses else 1) + per_norm * hidden + _mlp_elements(model, selective) / layout.tensor


def _mlp_elements(model: ModelConfig, selective: bool) -> float:
    """Of an average layer: the inputs of the activation, unless they are all that is needed, and of the last matrix."""
    tensors = 4 if model.gated else 1 if model.activation == "relu" else 2
    if selective:
        tensors = 3 if model.gated else 2
    if model.moe is None:
        return tensors * model.ffn_size
    layers = [layer for layer in range(model.decoder_layers or model.encoder_layers) if model.has_experts(layer)]
    share = len(layers) / (model.decoder_layers or model.encoder_layers)
    experts = (tensors * expert_ffn_size(model) + 2 * model.hidden_size) * model.moe.choices
    shared = tensors * expert_ffn_size(model) * model.moe.num_shared_experts
    return (1 - share) * tensors * model.ffn_size + share * (experts + shared)


def _logits_bytes(config: RunConfig, layout: Layout, lengths: Lengths) -> int:
    tokens = min(config.train.loss_chunk_tokens, config.train.micro_batch_size * lengths.main // layout.context)
    return tokens * config.model.padded_vocab_size // layout.tensor * LOGITS_BYTES
