"""How much a part of a model matters: by its weights alone, or by what it writes when the model reads a text.

A unit of a block is what can be left out of it: a group of heads with their keys and values, or a neuron of an MLP.

Shape suffixes: O outputs, I inputs, U units, W inputs of a unit, B micro-batch, S sequence, H hidden.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from llmtrain.compress.layer_inputs import InputSums
from llmtrain.compress.layered import LayeredModel
from llmtrain.config.model import ModelConfig
from llmtrain.config.parameters import parameter_shapes
from llmtrain.interop.name_table import ReadTensor
from llmtrain.values.batch import Batch

WRITES = (".out.weight", ".down.weight", ".experts.down")
"""Ends of the names of the weights of a layer whose output is added to the residual stream."""


@dataclass(frozen=True)
class Slices:
    """The places that a unit has in a tensor: so many neighbours along a dimension."""

    name: str
    dim: int
    width: int


@dataclass(frozen=True)
class Block:
    """What reads for the units of a block of a layer, and the weight with what they write."""

    reads: tuple[Slices, ...]
    writes: Slices


class Importance(Protocol):
    """Scores, the larger the more it matters. Of units [U], of a layer one number."""

    def of_units(self, block: Block) -> Tensor: ...

    def of_layer(self, layer: str) -> float: ...


class ByMagnitude:
    """Of a unit the product of the norms of what reads for it and of what it writes, which does not change where one
    is scaled up and the other down; of a layer the norm of all that it writes."""

    def __init__(self, model: ModelConfig, read: ReadTensor) -> None:
        self._names, self._read = tuple(parameter_shapes(model)), read

    def of_units(self, block: Block) -> Tensor:
        read_U = torch.stack([self._squares(part) for part in block.reads]).sum(0)
        return read_U * self._squares(block.writes)

    def of_layer(self, layer: str) -> float:
        names = [name for name in self._names if name.startswith(f"{layer}.") and name.endswith(WRITES)]
        return float(sum(self._read(name).double().square().sum() for name in names))

    def _squares(self, part: Slices) -> Tensor:
        """[U]: the sum of the squares of each unit's weights."""
        squares = self._read(part.name).double().square().movedim(part.dim, 0)
        return squares.reshape(len(squares) // part.width, -1).sum(1)


class ByText:
    """Of a unit the squared norm of what it writes over a text, of a layer how far it turns the residual stream: one
    minus the cosine between what goes in and what comes out (Men et al. 2024, "ShortGPT", equation 1)."""

    def __init__(self, model: LayeredModel, batches: Sequence[Batch], blocks: Sequence[Block]) -> None:
        self._units, self._layers = dict[str, Tensor](), dict[str, float]()
        writes = {block.writes.name: block.writes.width for block in blocks}
        for layer, module, calls in model.iter_layers(batches):
            inputs = InputSums(module)
            if writes:
                inputs.gather(calls)
            for name, weight in module.named_parameters():
                width = writes.get(f"{layer}.{name}")
                product_II = inputs.of(name.removesuffix(".weight")) if width else None
                if width and product_II is not None:
                    self._units[f"{layer}.{name}"] = written_squares(weight, product_II, width)
            if not writes:
                turns = [1 - cosine_similarity(call.x_SBH, call.through(module), dim=-1).double() for call in calls]
                self._layers[layer] = float(torch.cat([turn.flatten() for turn in turns]).mean())

    def of_units(self, block: Block) -> Tensor:
        return self._units[block.writes.name]

    def of_layer(self, layer: str) -> float:
        return self._layers[layer]


def written_squares(weight_OI: Tensor, product_II: Tensor, width: int) -> Tensor:
    """[U]: the sum over all positions of |W_u x_u|^2, of inputs whose x x^T add up to `product_II`."""
    parts_OUW = weight_OI.double().unflatten(1, (-1, width))
    products = product_II.view(*parts_OUW.shape[1:], *parts_OUW.shape[1:])
    own_WWU = products.diagonal(dim1=0, dim2=2)
    return torch.einsum("ouw,wvu,ouv->u", parts_OUW, own_WWU, parts_OUW)
