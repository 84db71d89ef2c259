"""Every trained tensor, declared once: its name and shape, how it is drawn, and how ranks split it. Pure.

Sizes, initial weights, sharding, stages and the name tables of other programs are read from here.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod
from typing import Literal

from llmtrain.config.finetune import FinetuneConfig
from llmtrain.config.model import ModelConfig

Draw = Literal["zeros", "ones", "embedding", "head", "position_bias", "query", "linear", "residual", "lora", "prompt"]
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


@dataclass(frozen=True)
class FrozenNames:
    """The parameters that are not trained: `name in frozen`.

    Those that one of `patterns` fits; and where `trained` is there, all that none of it fits.
    """

    patterns: tuple[str, ...] = ()
    trained: tuple[str, ...] | None = None

    def __bool__(self) -> bool:
        return bool(self.patterns) or self.trained is not None

    def __contains__(self, name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in self.patterns) or self.is_base(name)

    def is_base(self, name: str) -> bool:
        """True for a parameter of a model that others are trained beside."""
        return self.trained is not None and not any(fnmatchcase(name, pattern) for pattern in self.trained)


ADDED = ("*lora_[ab]", "*_adapter.*", "embeddings.prompt.*")
"""Patterns of what finetuning adds to a model."""

LABEL_HEADS = ("pooler.*", "classifier.*", "span.*")
"""Patterns of heads for labels, which no base has learned."""


def frozen_by(patterns: tuple[str, ...], finetune: FinetuneConfig | None) -> FrozenNames:
    """The parameters that are not trained, by optim.freeze and the method of finetuning."""
    if finetune is None or finetune.method == "full":
        return FrozenNames(patterns)
    also = finetune.lora.train_also if finetune.method == "lora" else ()
    return FrozenNames(patterns, (*ADDED, *LABEL_HEADS, *also))


def declare_parameters(model: ModelConfig, finetune: FinetuneConfig | None = None) -> dict[str, Parameter]:
    """By name, in the order of the model's modules, and then what finetuning adds. Needs model.vocab_size."""
    declared = {parameter.name: parameter for parameter in _model_parameters(model)}
    if finetune is not None and finetune.method != "full":
        added = {"lora": _lora, "adapter": _adapters, "prompt": _prompt}[finetune.method]
        declared |= {parameter.name: parameter for parameter in added(model, finetune)}
    return declared


def parameter_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Global name and shape of every tensor of a model, in the order of its modules. Needs model.vocab_size."""
    return {parameter.name: parameter.shape for parameter in _model_parameters(model)}


def num_parameters(model: ModelConfig) -> int:
    """Parameters of a model, a tied head once, rows that pad the vocabulary left out. Needs model.vocab_size."""
    return sum(num_elements(parameter, model) for parameter in _model_parameters(model))


def num_trained(model: ModelConfig, finetune: FinetuneConfig | None, frozen: FrozenNames) -> int:
    """Parameters that are trained, counted as `num_parameters` counts."""
    declared = declare_parameters(model, finetune).values()
    return sum(num_elements(parameter, model) for parameter in declared if parameter.name not in frozen)


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
    return any(fnmatchcase(name, pattern) for pattern in LABEL_HEADS)


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


def iter_linears(model: ModelConfig) -> Iterator[tuple[str, Parameter]]:
    """The linears of all layers that a low-rank update may be added to: name, such as decoder.layers.0.attention.q or
    decoder.layers.0.moe.experts.up, and weight."""
    for parameter in _model_parameters(model):
        is_linear = parameter.draw in ("linear", "query", "residual") and len(parameter.shape) >= 2
        if is_linear and ".layers." in parameter.name and not parameter.name.endswith("router.weight"):
            yield parameter.name.removesuffix(".weight"), parameter


BLOCKS = {
    "attention": ("attention",),
    "cross_attention": ("attention", "cross_attention"),
    "mlp": ("mlp",),
    "moe.shared": ("mlp", "shared"),
    "moe.experts": ("mlp", "experts"),
}
"""The names of finetune.lora.targets by which the linears of a layer's block are meant."""


def pruned_linears(model: ModelConfig, targets: Sequence[str]) -> Iterator[tuple[str, Parameter]]:
    """Those of `iter_linears` that some of `prune.targets` mean."""
    for linear, weight in iter_linears(model):
        if any(is_target(linear, target) for target in targets):
            yield linear, weight


def quantized_linears(model: ModelConfig, keep: Sequence[str]) -> Iterator[tuple[str, Parameter]]:
    """Those of `iter_linears` that none of `quantize.keep` means."""
    for linear, weight in iter_linears(model):
        if not any(is_kept(linear, pattern) for pattern in keep):
            yield linear, weight


def is_kept(linear: str, pattern: str) -> bool:
    """True where one of `quantize.keep`, or of --keep, means a linear, or its weight."""
    return is_target(linear, pattern) or fnmatchcase(f"{linear}.weight", pattern)


def target_names(linear: str) -> list[str]:
    """The short names of finetune.lora.targets that mean a linear, such as attention and attention.q."""
    block, _, leaf = linear.split(".", 3)[3].rpartition(".")
    return [name for short in BLOCKS[block] for name in (short, f"{short}.{leaf}")]


def is_target(linear: str, target: str) -> bool:
    """True where one of finetune.lora.targets means a linear."""
    return target in target_names(linear) or fnmatchcase(linear, target)


def _lora(model: ModelConfig, finetune: FinetuneConfig) -> Iterator[Parameter]:
    """A [r, in] and B [out, r] of every target, of experts stacked.

    Column linears: each tensor rank multiplies what is whole by all of A, and its own rows of B, so A's gradients are
    parts. Row linears: A is split as the weight, and B gets the sum of the ranks' products; but inside of experts,
    whose outputs are summed anyway, each rank's product goes through all of B.
    """
    rank, lora = finetune.lora.rank, finetune.lora
    for linear, weight in iter_linears(model):
        if not any(is_target(linear, target) for target in lora.targets):
            continue
        *stacked, rows, columns = weight.shape
        is_row = weight.split == len(weight.shape) - 1
        column_split = None if is_row else weight.split
        prefix = f"{linear}_lora" if weight.expert else f"{linear}.lora"
        a_shape, b_shape = (*stacked, rank, columns), (*stacked, rows, rank)
        is_column = column_split is not None
        yield Parameter(f"{prefix}_a", a_shape, "lora", weight.split if is_row else None, weight.expert, is_column)
        yield Parameter(f"{prefix}_b", b_shape, "zeros", column_split, weight.expert, is_row and weight.expert)


def _adapters(model: ModelConfig, finetune: FinetuneConfig) -> Iterator[Parameter]:
    size, hidden = finetune.adapter.size, model.hidden_size
    blocks = ("mlp",) if finetune.adapter.placement == "output" else ("attention", "mlp")
    for stack, num_layers in (("encoder", model.encoder_layers), ("decoder", model.decoder_layers)):
        for layer in range(num_layers):
            for block in blocks:
                name = f"{stack}.layers.{layer}.{block}_adapter"
                yield from _linear(f"{name}.down", size, hidden, bias=True)
                yield from _linear(f"{name}.up", hidden, size, bias=True, draw="zeros")


def _prompt(model: ModelConfig, finetune: FinetuneConfig) -> Iterator[Parameter]:
    yield Parameter("embeddings.prompt.weight", (finetune.prompt.tokens, model.hidden_size), "prompt")
