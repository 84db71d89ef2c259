"""Structured pruning: the heads, the inner width or the layers of a model that matter least are left out.

What is left is a plain model of the same family: all layers keep equally many, each its own.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from llmtrain.compress.importance import Block, Importance, Slices
from llmtrain.config.model import ModelConfig
from llmtrain.config.parameters import num_parameters, parameter_shapes
from llmtrain.errors import ConfigError
from llmtrain.interop.name_table import ReadTensor

WIDTH_MULTIPLE = 8
"""Of what is left of an MLP: kernels read rows in pieces."""

KINDS = ("heads", "ffn", "layers")

Kept = Mapping[int, Tensor]
"""By dimension of a tensor, the places that stay, ascending."""


@dataclass(frozen=True)
class SmallerModel:
    """A model whose tensors are parts of those of a larger one."""

    model: ModelConfig
    origins: Mapping[str, tuple[str, Kept]]
    """By name, that of the tensor in the larger model, and what stays of it."""
    left_out: frozenset[str] = frozenset()
    """The layers of the larger model that have no place in it."""

    def cut(self, larger: ReadTensor) -> ReadTensor:
        """Reads its tensors, whole, from those of the larger model."""

        def read(name: str, expert: int | None = None) -> Tensor:
            origin, kept = self.origins[name]
            tensor = larger(origin, expert)
            for dim, places in kept.items():
                tensor = tensor.index_select(dim, places)
            return tensor

        return read

    def silenced(self, larger: ReadTensor, blocks: Iterable[Block]) -> ReadTensor:
        """Reads the larger model's tensors, where what is left out of a block writes nothing."""
        written = {block.writes.name: block.writes.dim for block in blocks}

        def read(name: str, expert: int | None = None) -> Tensor:
            tensor = larger(name, expert)
            if name not in written:
                return tensor
            dim, places = written[name], self.origins[name][1][written[name]]
            return torch.zeros_like(tensor).index_copy_(dim, places, tensor.index_select(dim, places))

        return read


def fewer_parts(model: ModelConfig, kind: str, sparsity: float) -> ModelConfig:
    """The model without a share of its heads, neurons or layers. Raises ConfigError where it has none to leave out."""
    if fault := _obstacle(model, kind):
        raise ConfigError(f"--prune {kind}: {fault}")
    smaller = model.with_keys(_keys(model, kind, 1 - sparsity))
    if num_parameters(smaller) >= num_parameters(model):
        raise ConfigError(f"--sparsity {sparsity:g}: leaves all {kind} of the model. Try more.")
    return smaller


def _obstacle(model: ModelConfig, kind: str) -> str | None:
    if kind == "heads" and model.position in ("alibi", "t5_relative"):
        return f"model.position = {model.position} gives each head its own positions. Try --prune ffn or layers."
    if kind == "heads" and model.attention.sinks:
        return "model.attention.sinks belong to heads. Try --prune ffn or layers."
    if kind == "ffn" and model.moe is not None:
        return "the model has experts, of which a router chooses. Try --prune layers, or weights."
    if kind == "layers" and model.moe is not None and model.moe.every_n_layers > 1:
        return f"one layer in {model.moe.every_n_layers} has experts, and others would. Try --prune heads, or weights."
    return None


def _keys(model: ModelConfig, kind: str, share: float) -> dict[str, int]:
    """The keys of the model that change, where a share of a kind of units stays."""
    if kind == "heads":
        units = max(1, round(model.kv_heads * share))
        queries = units * (model.num_heads // model.kv_heads)
        return {"num_heads": queries, "num_kv_heads": units, "head_dim": model.head_size}
    if kind == "ffn":
        return {"ffn_hidden_size": max(1, round(model.ffn_size * share / WIDTH_MULTIPLE)) * WIDTH_MULTIPLE}
    sides = {"num_layers": model.num_layers}
    if model.family == "encoder_decoder":
        sides["num_encoder_layers"] = model.encoder_layers
    return {key: max(1, round(count * share)) for key, count in sides.items()}


def smaller_model(model: ModelConfig, smaller: ModelConfig, kind: str, importance: Importance) -> SmallerModel:
    """The model of `fewer_parts`, with what matters most of the larger one."""
    if kind == "layers":
        return _fewer_layers(model, smaller, importance)
    units = smaller.kv_heads if kind == "heads" else smaller.ffn_size
    origins: dict[str, tuple[str, Kept]] = {name: (name, {}) for name in parameter_shapes(model)}
    for block in iter_blocks(model, kind):
        kept = _highest(importance.of_units(block), units)
        for part in (*block.reads, block.writes):
            places = (kept[:, None] * part.width + torch.arange(part.width)).flatten()
            origins[part.name] = (part.name, {part.dim: places})
    return SmallerModel(smaller, origins)


def iter_blocks(model: ModelConfig, kind: str) -> Iterator[Block]:
    """The blocks of all layers that have units of a kind; none where layers are left out."""
    names = {"heads": ("attention", "cross_attention"), "ffn": ("mlp",), "layers": ()}[kind]
    size, group = model.head_size, model.num_heads // model.kv_heads
    widths = {"q": size * group, "k": size, "v": size} if kind == "heads" else {"gate": 1, "up": 1}
    writes, width = ("out", size * group) if kind == "heads" else ("down", 1)
    declared = parameter_shapes(model)
    layers = [("encoder", number) for number in range(model.encoder_layers)]
    layers += [("decoder", number) for number in range(model.decoder_layers)]
    for side, number in layers:
        for block in (f"{side}.layers.{number}.{name}" for name in names):
            reads = [
                Slices(f"{block}.{name}.{leaf}", 0, widths[name]) for name in widths for leaf in ("weight", "bias")
            ]
            present = tuple(part for part in reads if part.name in declared)
            if present:
                yield Block(present, Slices(f"{block}.{writes}.weight", 1, width))


def _highest(scores: Tensor, count: int) -> Tensor:
    """The places of the highest scores, ascending; of equal ones the first stay."""
    return scores.argsort(descending=True, stable=True)[:count].sort().values


def _fewer_layers(model: ModelConfig, smaller: ModelConfig, importance: Importance) -> SmallerModel:
    kept, left_out = dict[str, list[int]](), set[str]()
    for side, count, units in (
        ("encoder", model.encoder_layers, smaller.encoder_layers),
        ("decoder", model.decoder_layers, smaller.decoder_layers),
    ):
        scores = torch.tensor([importance.of_layer(f"{side}.layers.{layer}") for layer in range(count)]).double()
        kept[side] = _highest(scores, units).tolist()
        left_out |= {f"{side}.layers.{layer}" for layer in set(range(count)) - set(kept[side])}
    origins: dict[str, tuple[str, Kept]] = {}
    for name in parameter_shapes(smaller):
        side, _, rest = name.partition(".layers.")
        layer, _, leaf = rest.partition(".")
        origins[name] = (f"{side}.layers.{kept[side][int(layer)]}.{leaf}" if rest else name, {})
    return SmallerModel(smaller, origins, frozenset(left_out))
