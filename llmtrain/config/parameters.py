"""Every trained tensor, declared once: its name and shape, how it is drawn, and how ranks split it. Pure.

Sizes, initial weights, sharding, stages and the name tables of other programs are read from here.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod
from typing import Literal

from llmtrain.config.model import ModelConfig

Draw = Literal["zeros", "ones", "embedding", "head", "position_bias", "query", "linear", "residual"]
"""How a tensor begins; models/init.py has the formulas. residual: its output is added to the residual stream."""

Split = Literal["column", "row"]
"""Of a matrix [out, in] of tensor ranks: column splits its rows, which make columns of the output; row splits its
columns, and outputs are summed."""


@dataclass(frozen=True)
class Parameter:
    """A tensor of the whole model.

    `split` is the dimension that tensor ranks split; None where each has all of it. `expert`: it stacks experts, and
    expert ranks split its first dimension. `partial`: each tensor rank uses all of it on its own heads only, so
    gradients are to be summed over them. `vocabulary`: its first dimension is the vocabulary, padded. `on_all_stages`:
    it is on every pipeline stage with layers of its stack; gradients are summed over the stages, and one of the copies
    counts and is saved.
    """

    name: str
    shape: tuple[int, ...]
    draw: Draw
    split: int | None = None
    expert: bool = False
    partial: bool = False
    vocabulary: bool = False
    on_all_stages: bool = False


def declare_parameters(model: ModelConfig) -> dict[str, Parameter]:
    """By name, in the order of the model's modules. Needs model.vocab_size."""
    return {parameter.name: parameter for parameter in _model_parameters(model)}


def parameter_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Global name and shape of every trained tensor, in the order of the model's modules. Needs model.vocab_size."""
    return {parameter.name: parameter.shape for parameter in _model_parameters(model)}


def is_frozen(name: str, patterns: Iterable[str]) -> bool:
    """True where a parameter is not trained, by the patterns of `optim.freeze`."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def frozen_names(model: ModelConfig, patterns: Sequence[str]) -> list[str]:
    """The parameters that are not trained. Needs model.vocab_size."""
    return [parameter.name for parameter in _model_parameters(model) if is_frozen(parameter.name, patterns)]


def num_parameters(model: ModelConfig, freeze: Iterable[str] = ()) -> int:
    """Parameters that are trained, a tied head once, rows that pad the vocabulary left out. Needs model.vocab_size."""
    return sum(num_elements(p, model) for p in _model_parameters(model) if not is_frozen(p.name, freeze))


def num_elements(parameter: Parameter, model: ModelConfig) -> int:
    """Elements of a parameter, rows that pad the vocabulary left out."""
    return prod((model.vocabulary, *parameter.shape[1:]) if parameter.vocabulary else parameter.shape)


def num_active_parameters(model: ModelConfig) -> int:
    """The parameters that one token meets: of the experts, top_k of each layer."""
    if model.moe is None:
        return num_parameters(model)
    # All but the shared ones, which every token meets.
    experts = sum(prod(parameter.shape) for parameter in _model_parameters(model) if parameter.expert)
    return num_parameters(model) - experts + experts * model.moe.choices // model.moe.num_experts


def expert_ffn_size(model: ModelConfig) -> int:
    """Inner width of an expert."""
    assert model.moe is not None
    return model.moe.ffn_hidden_size or model.ffn_size


def _model_parameters(model: ModelConfig) -> Iterator[Parameter]:
    hidden, rows = model.hidden_size, model.padded_vocab_size
    yield Parameter("embeddings.word.weight", (rows, hidden), "embedding", split=0, vocabulary=True)
    if model.position == "learned":
        yield Parameter("embeddings.position.weight", (model.max_seq_len, hidden), "embedding")
    if model.token_types:
        yield Parameter("embeddings.token_type.weight", (model.token_types, hidden), "embedding")
    if model.embedding_norm:
        yield from _norm(model, "embeddings.norm")
    for stack, num_layers in (("encoder", model.encoder_layers), ("decoder", model.decoder_layers)):
        if num_layers:
            yield from _stack(model, stack, num_layers)
    if model.head == "mlm":
        yield Parameter("mlm.bias", (rows,), "zeros", split=0, vocabulary=True)
        yield from _linear("mlm.dense", hidden, hidden, bias=True)
        yield from _norm(model, "mlm.norm")
    if model.predicts_labels:
        yield from _label_head(model)
    elif not model.tie_embeddings:
        yield Parameter("head.weight", (rows, hidden), "head", split=0, vocabulary=True)


def is_of_label_head(name: str) -> bool:
    """True for the parameters that a model has for labels, and a model of tokens has not."""
    return name.startswith(("pooler.", "classifier.", "span."))


def _label_head(model: ModelConfig) -> Iterator[Parameter]:
    """Small, and whole on every tensor rank."""
    hidden, classes = model.hidden_size, model.num_classes
    if model.has_pooler:
        yield from _linear("pooler.dense", hidden, hidden, bias=True)
    if model.head == "span":
        yield from _linear("span", classes, hidden, bias=True)
    else:
        # As transformers has them: a decoder's classifier of samples has no bias.
        yield from _linear("classifier", classes, hidden, bias=model.head == "token_classifier" or model.has_pooler)


def _stack(model: ModelConfig, stack: str, num_layers: int) -> Iterator[Parameter]:
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
        shape = (model.relative_buckets, model.num_heads)
        yield Parameter(f"{stack}.position_bias.weight", shape, "position_bias", split=1, on_all_stages=True)


def _attention(model: ModelConfig, name: str, cross: bool) -> Iterator[Parameter]:
    queries, keys = model.num_heads * model.head_size, model.kv_heads * model.head_size
    if model.attention.sinks and not cross:
        yield Parameter(f"{name}.sinks", (model.num_heads,), "zeros", split=0)
    yield from _linear(f"{name}.q", queries, model.hidden_size, model.bias, "column", "query")
    yield from _linear(f"{name}.k", keys, model.hidden_size, model.bias, "column")
    yield from _linear(f"{name}.v", keys, model.hidden_size, model.bias, "column")
    yield from _linear(f"{name}.out", model.hidden_size, queries, model.bias, "row", "residual")
    if model.qk_norm:
        yield Parameter(f"{name}.q_norm.weight", (model.head_size,), "ones", partial=True)
        yield Parameter(f"{name}.k_norm.weight", (model.head_size,), "ones", partial=True)


def _mlp(model: ModelConfig, name: str, width: int, bias: bool) -> Iterator[Parameter]:
    if model.gated:
        yield from _linear(f"{name}.gate", width, model.hidden_size, bias, "column")
    yield from _linear(f"{name}.up", width, model.hidden_size, bias, "column")
    yield from _linear(f"{name}.down", model.hidden_size, width, bias, "row", "residual")


def _moe(model: ModelConfig, name: str) -> Iterator[Parameter]:
    assert model.moe is not None
    num_experts, width = model.moe.num_experts, expert_ffn_size(model)
    yield Parameter(f"{name}.router.weight", (num_experts, model.hidden_size), "linear")
    if model.gated:
        yield Parameter(f"{name}.experts.gate", (num_experts, width, model.hidden_size), "linear", 1, expert=True)
    yield Parameter(f"{name}.experts.up", (num_experts, width, model.hidden_size), "linear", 1, expert=True)
    yield Parameter(f"{name}.experts.down", (num_experts, model.hidden_size, width), "residual", 2, expert=True)
    if model.moe.num_shared_experts:
        yield from _mlp(model, f"{name}.shared", width * model.moe.num_shared_experts, bias=False)


def _linear(
    name: str, rows: int, columns: int, bias: bool, split: Split | None = None, draw: Draw = "linear"
) -> Iterator[Parameter]:
    dims = {"column": 0, "row": 1}
    yield Parameter(f"{name}.weight", (rows, columns), draw, dims[split] if split else None)
    if bias:  # a row's bias is added once, to the sum
        yield Parameter(f"{name}.bias", (rows,), "zeros", 0 if split == "column" else None)


def _norm(model: ModelConfig, name: str) -> Iterator[Parameter]:
    yield Parameter(f"{name}.weight", (model.hidden_size,), "ones")
    if model.norm == "layernorm":
        yield Parameter(f"{name}.bias", (model.hidden_size,), "zeros")
