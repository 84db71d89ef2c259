"""Terms of what a training step sends that are the same on every engine with parallel axes, and what they are made of.

Each term is a line of docs/communication.md.
"""

from collections import Counter
from math import lcm

from llmtrain.config.parameters import declare_parameters
from llmtrain.config.schema import RunConfig
from llmtrain.models.transformer import build_model
from llmtrain.parallel.layout import Layout, plan_chunks

Calls = Counter[tuple[str, int]]

FP32_BYTES, BF16_BYTES, COUNT_BYTES = 4, 2, 8


def held_parameters(config: RunConfig, layout: Layout, stage: int) -> list[tuple[str, int]]:
    """(name, elements) of what a rank of a pipeline stage holds, in the order of the model."""
    chunks = plan_chunks(layout, config.model.num_layers, None, stage)
    held, declared = [], declare_parameters(config.model)
    for name, parameter in build_model(config.model).named_parameters():
        number = int(name.split(".")[2]) if name.startswith("decoder.layers.") else None
        here = any(number in chunk.layers for chunk in chunks) if number is not None else {
            "embeddings": any(chunk.first or (chunk.last and config.model.tie_embeddings) for chunk in chunks),
        }.get(name.split(".")[0], any(chunk.last for chunk in chunks))  # fmt: skip
        if here:
            held.append((name, parameter.numel() // (layout.tensor if declared[name].split is not None else 1)))
    return held


def micro_batches_of_rank(config: RunConfig, layout: Layout) -> int:
    return config.train.global_batch_size // (config.train.micro_batch_size * layout.data)


def tokens_of_rank(config: RunConfig, layout: Layout) -> int:
    """Tokens of a micro-batch on a context rank."""
    return config.train.micro_batch_size * config.data.seq_len // layout.context


def hidden_bytes(config: RunConfig, layout: Layout) -> int:
    """The residual stream of a micro-batch inside a block, in fp32."""
    return tokens_of_rank(config, layout) * config.model.hidden_size * FP32_BYTES


def block_calls(config: RunConfig, layout: Layout, stage: int) -> Calls:
    """The tensor, sequence and context axes: activations in fp32, and the partial gradients of parameters."""
    model, calls = config.model, Calls()
    micro_batches = micro_batches_of_rank(config, layout)
    tokens = tokens_of_rank(config, layout)
    layers = sum(len(chunk.layers) for chunk in plan_chunks(layout, model.num_layers, None, stage))
    first, last = stage == 0, stage == layout.pipeline - 1

    # Tensor: each block once into the region and once out of it, forward and backward; the ends once each.
    if layout.tensor > 1:
        crossings = micro_batches * (4 * layers + first + last)
        for name in ("all_gather", "reduce_scatter") if layout.sequence else ("all_reduce",):
            calls[name, hidden_bytes(config, layout)] += crossings
        if last:  # cross-entropy: each rank's largest logit, sum of exponentials and label's logit
            calls["all_gather", tokens * FP32_BYTES * 3 * layout.tensor] += micro_batches
    # Sequence: parameters used on a part of the sequence have partial gradients.
    if layout.sequence:
        declared = declare_parameters(model)
        whole = sum(size for name, size in held_parameters(config, layout, stage) if declared[name].split is None)
        calls["all_reduce", whole * FP32_BYTES] += 1

    # Context: queries and outputs, keys and values, each forward and backward; or blocks of keys and values forward and
    # again backward, and their gradients.
    head_bytes = tokens * model.head_size * FP32_BYTES
    if layout.context > 1 and config.context_exchange == "ring":
        block = 2 * head_bytes * model.kv_heads // layout.tensor
        calls["send", block] += 3 * (layout.context - 1) * layers * micro_batches
    elif layout.context > 1:
        # Key heads that the ranks cannot share out are repeated first.
        dealt = lcm(model.kv_heads // layout.tensor, layout.context)
        calls["all_to_all", head_bytes * model.num_heads // layout.tensor] += 4 * layers * micro_batches
        calls["all_to_all", head_bytes * dealt] += 4 * layers * micro_batches
    return calls
