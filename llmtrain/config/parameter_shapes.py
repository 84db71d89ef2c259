"""Sizes that follow from a model's configuration by arithmetic alone: which tensors there are, and how large."""

from collections.abc import Iterator
from math import prod

from llmtrain.config.model import ModelConfig

Shapes = Iterator[tuple[str, tuple[int, ...]]]

VOCABULARY_TENSORS = ("embeddings.word.weight", "head.weight", "mlm.bias")
"""Their first dimension is the vocabulary, padded."""


def parameter_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Global name and shape of every trained tensor, in the order of the model's modules. Needs model.vocab_size."""
    return dict(_model_shapes(model))


def num_parameters(model: ModelConfig) -> int:
    """All trained parameters, a tied head once, rows that pad the vocabulary left out. Needs model.vocab_size."""
    return sum(
        prod((model.vocabulary, *shape[1:]) if name in VOCABULARY_TENSORS else shape)
        for name, shape in parameter_shapes(model).items()
    )


def num_active_parameters(model: ModelConfig) -> int:
    """Those that one token meets: of the experts, top_k of each layer."""
    if model.moe is None:
        return num_parameters(model)
    experts = num_expert_parameters(model)
    return num_parameters(model) - experts + experts * model.moe.choices // model.moe.num_experts


def num_expert_parameters(model: ModelConfig) -> int:
    """Those of all experts but the shared ones: what expert ranks spread."""
    return sum(prod(shape) for name, shape in parameter_shapes(model).items() if ".moe.experts." in name)


def expert_ffn_size(model: ModelConfig) -> int:
    """Inner width of an expert."""
    assert model.moe is not None
    return model.moe.ffn_hidden_size or model.ffn_size


def _model_shapes(model: ModelConfig) -> Shapes:
    hidden = model.hidden_size
    yield "embeddings.word.weight", (model.padded_vocab_size, hidden)
    if model.position == "learned":
        yield "embeddings.position.weight", (model.max_seq_len, hidden)
    if model.token_types:
        yield "embeddings.token_type.weight", (model.token_types, hidden)
    if model.embedding_norm:
        yield from _norm(model, "embeddings.norm")
    for stack, num_layers in (("encoder", model.encoder_layers), ("decoder", model.decoder_layers)):
        if num_layers:
            yield from _stack(model, stack, num_layers)
    if model.head == "mlm":
        yield "mlm.bias", (model.padded_vocab_size,)
        yield from _linear("mlm.dense", hidden, hidden, bias=True)
        yield from _norm(model, "mlm.norm")
    if not model.tie_embeddings:
        yield "head.weight", (model.padded_vocab_size, hidden)


def _stack(model: ModelConfig, stack: str, num_layers: int) -> Shapes:
    for layer in range(num_layers):
        prefix = f"{stack}.layers.{layer}"
        yield from _norm(model, f"{prefix}.attention_norm")
        yield from _attention(model, f"{prefix}.attention", cross=False)
        if model.family == "encoder_decoder" and stack == "decoder":
            yield from _norm(model, f"{prefix}.cross_attention_norm")
            yield from _attention(model, f"{prefix}.cross_attention", cross=True)
        yield from _norm(model, f"{prefix}.mlp_norm")
        if model.has_experts(layer):
            yield from _moe(model, f"{prefix}.moe")
        else:
            yield from _mlp(model, f"{prefix}.mlp", model.ffn_size, model.bias)
    if model.norm_position == "pre":
        yield from _norm(model, f"{stack}.final_norm")
    if model.position == "t5_relative":
        yield f"{stack}.position_bias.weight", (model.relative_buckets, model.num_heads)


def _attention(model: ModelConfig, name: str, cross: bool) -> Shapes:
    queries, keys = model.num_heads * model.head_size, model.kv_heads * model.head_size
    if model.attention.sinks and not cross:
        yield f"{name}.sinks", (model.num_heads,)
    yield from _linear(f"{name}.q", queries, model.hidden_size, model.bias)
    yield from _linear(f"{name}.k", keys, model.hidden_size, model.bias)
    yield from _linear(f"{name}.v", keys, model.hidden_size, model.bias)
    yield from _linear(f"{name}.out", model.hidden_size, queries, model.bias)
    if model.qk_norm:
        yield f"{name}.q_norm.weight", (model.head_size,)
        yield f"{name}.k_norm.weight", (model.head_size,)


def _mlp(model: ModelConfig, name: str, width: int, bias: bool) -> Shapes:
    if model.gated:
        yield from _linear(f"{name}.gate", width, model.hidden_size, bias)
    yield from _linear(f"{name}.up", width, model.hidden_size, bias)
    yield from _linear(f"{name}.down", model.hidden_size, width, bias)


def _moe(model: ModelConfig, name: str) -> Shapes:
    assert model.moe is not None
    num_experts, width = model.moe.num_experts, expert_ffn_size(model)
    yield f"{name}.router.weight", (num_experts, model.hidden_size)
    if model.gated:
        yield f"{name}.experts.gate", (num_experts, width, model.hidden_size)
    yield f"{name}.experts.up", (num_experts, width, model.hidden_size)
    yield f"{name}.experts.down", (num_experts, model.hidden_size, width)
    if model.moe.num_shared_experts:
        yield from _mlp(model, f"{name}.shared", width * model.moe.num_shared_experts, bias=False)


def _linear(name: str, rows: int, columns: int, bias: bool) -> Shapes:
    yield f"{name}.weight", (rows, columns)
    if bias:
        yield f"{name}.bias", (rows,)


def _norm(model: ModelConfig, name: str) -> Shapes:
    yield f"{name}.weight", (model.hidden_size,)
    if model.norm == "layernorm":
        yield f"{name}.bias", (model.hidden_size,)
