"""Tables of the names and shapes of a family's weights, and the two directions through them.

A row names modules. It holds for the weight and, where the model has one, the bias of each. Weights are [out, in].
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

import torch
from torch import Tensor

from llmtrain.config.model import ModelConfig
from llmtrain.config.parameters import parameter_shapes

LAYER, EXPERT = "{n}", "{e}"
"""Stand for the number of a layer and of an expert in a row."""


class ReadTensor(Protocol):
    """A whole tensor by our name, on the CPU; of stacked experts that of one, where its number is given."""

    def __call__(self, name: str, expert: int | None = None) -> Tensor: ...


class Shape(Enum):
    """The relation of the tensor on the other side to ours."""

    SAME = "same"
    TRANSPOSED = "transposed"
    """The weight is [in, out] there."""
    FUSED = "fused"
    """Several of our modules, their outputs one after the other and then transposed, are one module there."""
    JOINED = "joined"
    """Several of our modules, their outputs one after the other, are one module there."""
    INTERLEAVED = "interleaved"
    """Of the outputs of each head, those of the first half and of the second half alternate there."""
    VOCABULARY = "vocabulary"
    """The rows that pad the vocabulary are not there."""
    EXPERT = "expert"
    """Ours is one tensor of all experts; there each expert has a module of its own."""
    STACKED = "stacked"
    """Both have one tensor of all experts; several of ours, their outputs one after the other, are one there."""


@dataclass(frozen=True)
class Row:
    """Our module, or modules of equal shape, and the module on the other side.

    Layers are those of the stack that our name begins with. `copies` are modules there that have the same tensor: they
    are not written, but for `written_untied` where the head is not tied; read, they must be equal.
    """

    ours: str | tuple[str, ...]
    theirs: str
    shape: Shape = Shape.SAME
    copies: tuple[str, ...] = ()
    written_untied: bool = False

    @property
    def modules(self) -> tuple[str, ...]:
        return (self.ours,) if isinstance(self.ours, str) else self.ours

    @property
    def stack(self) -> str:
        """The stack whose layers it is for, "" for a row outside of layers."""
        return self.modules[0].split(".")[0] if LAYER in self.theirs else ""


Table = tuple[Row, ...]


@dataclass(frozen=True)
class Pairing:
    """One tensor on the other side and the names of ours that it is made of; `expert` where it is that of one.

    `stack` and `layer` say where it belongs, "" and 0 outside of layers.
    """

    ours: tuple[str, ...]
    theirs: str
    shape: Shape
    expert: int | None = None
    copies: tuple[str, ...] = ()
    written_copies: tuple[str, ...] = ()
    stack: str = ""
    layer: int = 0


def pairings(table: Table, model: ModelConfig) -> tuple[Pairing, ...]:
    """Every tensor of a model on the other side, layer after layer.

    Each of the model's parameters is in exactly one, of stacked experts each expert; rows for modules that the model
    does not have are left out.
    """
    assert covers(table, model), "the table of a family names each parameter exactly once"
    return _all_pairings(table, model)


def covers(table: Table, model: ModelConfig) -> bool:
    """True where a table names each of a model's parameters exactly once."""
    covered = [name for pairing in _all_pairings(table, model) if not pairing.expert for name in pairing.ours]
    return sorted(covered) == sorted(parameter_shapes(model))


def _all_pairings(table: Table, model: ModelConfig) -> tuple[Pairing, ...]:
    shapes = parameter_shapes(model)
    return tuple(
        pairing for row, layer in _rows_in_order(table, model) for pairing in _of_row(row, layer, model, shapes)
    )


def _of_row(row: Row, layer: int, model: ModelConfig, shapes: dict[str, tuple[int, ...]]) -> Iterator[Pairing]:
    """The tensors of a row in one layer."""
    modules = [module.replace(LAYER, str(layer)) for module in row.modules]
    theirs = row.theirs.replace(LAYER, str(layer))
    if row.shape in (Shape.EXPERT, Shape.STACKED):
        if modules[0] not in shapes:
            return
        if row.shape is Shape.STACKED:
            yield Pairing(tuple(modules), theirs, row.shape, stack=row.stack, layer=layer)
            return
        for expert in range(shapes[modules[0]][0]):
            name = f"{theirs.replace(EXPERT, str(expert))}.weight"
            yield Pairing(tuple(modules), name, row.shape, expert, stack=row.stack, layer=layer)
        return
    # A row's modules have biases together or not at all, so the first one decides.
    for suffix in ("weight", "bias"):
        ours = tuple(f"{module}.{suffix}" for module in modules)
        if ours[0] in shapes:
            copies = tuple(f"{module}.{suffix}" for module in row.copies)
            written = copies if row.written_untied and not (model.ties_head or model.predicts_labels) else ()
            yield Pairing(ours, f"{theirs}.{suffix}", row.shape, None, copies, written, row.stack, layer)


def is_transposed(table: Table) -> bool:
    """True where the matrices of layers lie as [in, out] on the other side."""
    return any(row.shape in (Shape.TRANSPOSED, Shape.FUSED) for row in table)


def head_name(table: Table) -> str:
    """The name of the output matrix on the other side, where it has one of its own."""
    return next(f"{row.theirs}.weight" for row in table if row.ours == "head")


def their_shape(pairing: Pairing, model: ModelConfig) -> tuple[int, ...]:
    """The shape that the tensor has on the other side."""
    ours = parameter_shapes(model)[pairing.ours[0]]
    match pairing.shape:
        case Shape.VOCABULARY:
            return (model.vocabulary, *ours[1:])
        case Shape.EXPERT:
            return ours[1:]
        case Shape.STACKED:
            return (ours[0], ours[1] * len(pairing.ours), ours[2])
        case _:
            stacked = (ours[0] * len(pairing.ours), *ours[1:])
            return stacked[::-1] if pairing.shape in (Shape.TRANSPOSED, Shape.FUSED) else stacked


def iter_theirs(table: Table, model: ModelConfig, read: ReadTensor) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the other side, made from ours one at a time."""
    for pairing in pairings(table, model):
        tensor = to_theirs(pairing, [read(name, pairing.expert) for name in pairing.ours], model)
        yield pairing.theirs, tensor
        for copy in pairing.written_copies:
            yield copy, tensor.clone()


def to_theirs(pairing: Pairing, tensors: Sequence[Tensor], model: ModelConfig) -> Tensor:
    """One tensor of the other side."""
    match pairing.shape:
        case Shape.SAME | Shape.EXPERT:
            return tensors[0]
        case Shape.TRANSPOSED:
            return _transposed(tensors[0])
        case Shape.FUSED:
            return _transposed(torch.cat(list(tensors)))
        case Shape.JOINED:
            return torch.cat(list(tensors))
        case Shape.INTERLEAVED:
            return tensors[0].unflatten(0, (-1, 2, model.head_size // 2)).transpose(1, 2).reshape(tensors[0].shape)
        case Shape.STACKED:
            return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), dim=1)
        case Shape.VOCABULARY:
            return tensors[0][: model.vocabulary]


def to_ours(pairing: Pairing, tensor: Tensor, model: ModelConfig) -> list[Tensor]:
    """Our tensors from one of the other side: the reverse of `to_theirs`, rows that pad the vocabulary zero."""
    match pairing.shape:
        case Shape.SAME | Shape.EXPERT:
            return [tensor]
        case Shape.TRANSPOSED:
            return [_transposed(tensor)]
        case Shape.FUSED:
            return [part.contiguous() for part in _transposed(tensor).chunk(len(pairing.ours))]
        case Shape.JOINED:
            return [part.contiguous() for part in tensor.chunk(len(pairing.ours))]
        case Shape.INTERLEAVED:
            return [tensor.unflatten(0, (-1, model.head_size // 2, 2)).transpose(1, 2).reshape(tensor.shape)]
        case Shape.STACKED:
            return [part.contiguous() for part in tensor.chunk(len(pairing.ours), dim=1)]
        case Shape.VOCABULARY:
            padding = tensor.new_zeros(model.padded_vocab_size - model.vocabulary, *tensor.shape[1:])
            return [torch.cat((tensor, padding))]


def _transposed(tensor: Tensor) -> Tensor:
    """A matrix transposed; a bias has nothing to transpose."""
    return tensor.T.contiguous() if tensor.dim() == 2 else tensor


def _rows_in_order(table: Table, model: ModelConfig) -> Iterator[tuple[Row, int]]:
    """Rows outside the layers where they stand, those of a stack once per layer, layer by layer."""
    num_layers = {"encoder": model.encoder_layers, "decoder": model.decoder_layers}
    done = set()
    for row in table:
        if not row.stack:
            yield row, 0
        elif row.stack not in done:
            done.add(row.stack)
            inner = [other for other in table if other.stack == row.stack]
            yield from ((other, layer) for layer in range(num_layers[row.stack]) for other in inner)
