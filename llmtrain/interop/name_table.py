"""How a family of models names and shapes its weights: tables, and the two directions through them.

A row names modules. It holds for the weight and, where the model has one, the bias of each. Weights are [out, in].
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from llmtrain.config.model import ModelConfig
from llmtrain.config.sizes import parameter_shapes

ReadTensor = Callable[[str], Tensor]
"""A whole tensor by its name, on the CPU."""

LAYER = "{n}"
"""Stands for the number of a layer in a row."""


class Shape(Enum):
    """How the tensor on the other side relates to ours."""

    SAME = "same"
    TRANSPOSED = "transposed"
    """The weight is [in, out] there."""
    FUSED = "fused"
    """Several of our modules, their outputs one after the other and then transposed, are one module there."""
    VOCABULARY = "vocabulary"
    """The rows that pad the vocabulary are not there."""


@dataclass(frozen=True)
class Row:
    """Our module, or modules of equal shape, and the module on the other side."""

    ours: str | tuple[str, ...]
    theirs: str
    shape: Shape = Shape.SAME

    @property
    def modules(self) -> tuple[str, ...]:
        return (self.ours,) if isinstance(self.ours, str) else self.ours


@dataclass(frozen=True)
class Pairing:
    """One tensor on the other side and the names of ours that it is made of."""

    ours: tuple[str, ...]
    theirs: str
    shape: Shape


def pairings(table: Sequence[Row], model: ModelConfig) -> list[Pairing]:
    """Every tensor of a model on the other side, layer after layer.

    Each of the model's parameters is in exactly one; rows for modules that the model does not have are left out.
    """
    shapes = parameter_shapes(model)
    found = []
    for row, layer in _rows_in_order(table, model.num_layers):
        for suffix in ("weight", "bias"):
            ours = tuple(f"{module.replace(LAYER, layer)}.{suffix}" for module in row.modules)
            if ours[0] in shapes:
                found.append(Pairing(ours, f"{row.theirs.replace(LAYER, layer)}.{suffix}", row.shape))
    covered = [name for pairing in found for name in pairing.ours]
    assert sorted(covered) == sorted(shapes), "the table of a family names each parameter exactly once"
    return found


def their_shape(pairing: Pairing, model: ModelConfig) -> tuple[int, ...]:
    """The shape that the tensor has on the other side."""
    ours = parameter_shapes(model)[pairing.ours[0]]
    if pairing.shape is Shape.VOCABULARY:
        return (model.vocabulary, *ours[1:])
    stacked = (ours[0] * len(pairing.ours), *ours[1:])
    return stacked[::-1] if pairing.shape in (Shape.TRANSPOSED, Shape.FUSED) else stacked


def iter_theirs(table: Sequence[Row], model: ModelConfig, read: ReadTensor) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the other side, made from ours one at a time."""
    for pairing in pairings(table, model):
        yield pairing.theirs, to_theirs(pairing, [read(name) for name in pairing.ours], model)


def to_theirs(pairing: Pairing, tensors: Sequence[Tensor], model: ModelConfig) -> Tensor:
    """One tensor of the other side."""
    match pairing.shape:
        case Shape.SAME:
            return tensors[0]
        case Shape.TRANSPOSED:
            return _transposed(tensors[0])
        case Shape.FUSED:
            return _transposed(torch.cat(list(tensors)))
        case Shape.VOCABULARY:
            return tensors[0][: model.vocabulary]


def to_ours(pairing: Pairing, tensor: Tensor, model: ModelConfig) -> list[Tensor]:
    """Our tensors from one of the other side: the reverse of `to_theirs`, rows that pad the vocabulary zero."""
    match pairing.shape:
        case Shape.SAME:
            return [tensor]
        case Shape.TRANSPOSED:
            return [_transposed(tensor)]
        case Shape.FUSED:
            return [part.contiguous() for part in _transposed(tensor).chunk(len(pairing.ours))]
        case Shape.VOCABULARY:
            padding = tensor.new_zeros(model.padded_vocab_size - model.vocabulary, *tensor.shape[1:])
            return [torch.cat((tensor, padding))]


def _transposed(tensor: Tensor) -> Tensor:
    """A matrix transposed; a bias has nothing to transpose."""
    return tensor.T.contiguous() if tensor.dim() == 2 else tensor


def _rows_in_order(table: Sequence[Row], num_layers: int) -> Iterator[tuple[Row, str]]:
    """Rows outside the layers where they stand, the others once per layer, layer by layer."""
    per_layer = [row for row in table if LAYER in row.theirs]
    for row in table:
        if row not in per_layer:
            yield row, ""
        elif row is per_layer[0]:
            yield from ((inner, str(layer)) for layer in range(num_layers) for inner in per_layer)
