"""Where the parameters of a rank lie in the global tensors, and pieces of them as boxes."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod

from torch import Tensor

from llmtrain.config.model import ModelConfig
from llmtrain.config.parameters import declare_parameters
from llmtrain.errors import CheckpointError
from llmtrain.models.init import initial_tensor
from llmtrain.values.fragment import Box, FragmentSource


@dataclass(frozen=True)
class Placement:
    """A parameter of this rank: its global name and shape, and the box of it that the rank holds.

    `owned` says whether this rank is the one, of the tensor ranks that hold the same box, that saves it; `replica` is
    its number among the ranks of the data and context axes that do.
    """

    name: str
    global_shape: tuple[int, ...]
    box: Box
    owned: bool = True
    replica: int = 0


def split_box(global_shape: tuple[int, ...], cuts: Mapping[int, tuple[int, int]]) -> Box:
    """One of the equal parts along some dimensions: `cuts` has, by dimension, its number and how many there are."""
    shape = tuple(size // cuts[dim][1] if dim in cuts else size for dim, size in enumerate(global_shape))
    return Box(tuple(cuts[dim][0] * size if dim in cuts else 0 for dim, size in enumerate(shape)), shape)


def iter_range_boxes(box: Box, start: int, stop: int) -> Iterator[tuple[Box, int]]:
    """The elements [start, stop) of a box's flattened self, as boxes of the global tensor with their place in it.

    At most 2n - 1 boxes for n dimensions: partial rows at both ends, whole rows between.
    """
    if stop <= start:
        return
    if len(box.shape) <= 1:
        offset = box.offsets[0] + start if box.shape else 0
        yield Box((offset,) if box.shape else (), (stop - start,) if box.shape else ()), 0
        return
    row = prod(box.shape[1:])
    first_whole, last_whole = -(-start // row), stop // row
    if first_whole > last_whole:  # inside one row
        yield from _row_boxes(box, start // row, start % row, stop - start // row * row, 0)
        return
    if start % row:
        yield from _row_boxes(box, first_whole - 1, start % row, row, 0)
    if last_whole > first_whole:
        offsets = (box.offsets[0] + first_whole, *box.offsets[1:])
        yield Box(offsets, (last_whole - first_whole, *box.shape[1:])), first_whole * row - start
    if stop % row:
        yield from _row_boxes(box, last_whole, 0, stop % row, last_whole * row - start)


def _row_boxes(box: Box, row: int, start: int, stop: int, place: int) -> Iterator[tuple[Box, int]]:
    inner = Box(box.offsets[1:], box.shape[1:])
    for part, offset in iter_range_boxes(inner, start, stop):
        yield Box((box.offsets[0] + row, *part.offsets), (1, *part.shape)), place + offset


def read_range(source: FragmentSource, placement: Placement, kind: str, span: tuple[int, int], target: Tensor) -> None:
    """Fill a flat tensor with the elements [start, stop) of this rank's part of a parameter."""
    check_shape(source, placement, kind)
    for box, place in iter_range_boxes(placement.box, *span):
        part = source.read(placement.name, kind, box)
        target[place : place + box.num_elements].copy_(part.flatten())


def check_shape(source: FragmentSource, placement: Placement, kind: str) -> None:
    """Raise CheckpointError where the source's tensor is not the model's."""
    shape = source.global_shape(placement.name, kind)
    if shape != placement.global_shape:
        found = "no such tensor" if shape is None else f"shape {list(shape)}"
        raise CheckpointError(
            f"{kind} of {placement.name}: the model needs shape {list(placement.global_shape)}, the checkpoint has "
            f"{found}. It was written by another architecture: train with the model section of its config.yaml."
        )


class InitialWeights:
    """The weights before the first step, as a source: each element a function of seed, name and global index."""

    def __init__(self, config: ModelConfig, seed: int) -> None:
        self._config = config
        self._seed = seed
        self._declared = declare_parameters(config)
        self._last: tuple[str, Tensor] | None = None

    def read(self, name: str, kind: str, box: Box) -> Tensor:
        declared = self._declared[name]
        if self._last is None or self._last[0] != name:  # boxes of one tensor are asked for one after the other
            self._last = name, initial_tensor(declared, self._config, self._seed)
        return self._last[1][box.slices_in(Box.whole(declared.shape))]

    def global_shape(self, name: str, kind: str) -> tuple[int, ...] | None:
        return self._declared[name].shape
