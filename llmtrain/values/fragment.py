"""Fragments: pieces of training state, named by where they lie in the whole run and not by who held them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class Box:
    """A rectangular part of a global tensor: element i of dimension d lies at offsets[d] + i."""

    offsets: tuple[int, ...]
    shape: tuple[int, ...]

    @staticmethod
    def whole(shape: Iterable[int]) -> "Box":
        shape = tuple(shape)
        return Box((0,) * len(shape), shape)

    @property
    def ends(self) -> tuple[int, ...]:
        """One past the last element, per dimension."""
        return tuple(offset + size for offset, size in zip(self.offsets, self.shape, strict=True))

    @property
    def num_elements(self) -> int:
        return prod(self.shape)

    def overlap(self, other: "Box") -> "Box | None":
        """The box of the elements in both; None where they share none."""
        offsets = tuple(map(max, self.offsets, other.offsets))
        ends = tuple(map(min, self.ends, other.ends))
        if any(end <= offset for offset, end in zip(offsets, ends, strict=True)):
            return None
        return Box(offsets, tuple(end - offset for offset, end in zip(offsets, ends, strict=True)))

    def slices_in(self, outer: "Box") -> tuple[slice, ...]:
        """The index that takes this box out of a tensor that holds `outer`."""
        return tuple(
            slice(offset - start, offset - start + size)
            for offset, start, size in zip(self.offsets, outer.offsets, self.shape, strict=True)
        )

    def relative_to(self, outer: "Box") -> "Box":
        """The same elements, counted from where `outer` begins."""
        offsets = tuple(offset - start for offset, start in zip(self.offsets, outer.offsets, strict=True))
        return Box(offsets, self.shape)


def tiling_problem(global_shape: Sequence[int], boxes: Iterable[Box]) -> str | None:
    """Why the boxes do not hold every element of the tensor exactly once; None where they do."""
    total = prod(global_shape)
    covered = 0
    ordered = sorted((box for box in boxes if box.num_elements or not total), key=lambda box: box.offsets)
    active: list[Box] = []
    for box in ordered:
        if len(box.offsets) != len(global_shape) or any(map(int.__gt__, box.ends, tuple(global_shape))):
            return f"the box {box.offsets} + {box.shape} is not inside the shape {tuple(global_shape)}"
        # Boxes are in order of their first row, so one that ends before this row meets none that follows.
        active = [other for other in active if not box.offsets or other.ends[0] > box.offsets[0]]
        clash = next((other for other in active if other.overlap(box)), None)
        if clash:
            return f"the boxes {clash.offsets} + {clash.shape} and {box.offsets} + {box.shape} overlap"
        active.append(box)
        covered += box.num_elements
    return None if covered == total else f"its boxes hold {covered} of {total} elements"


@dataclass(frozen=True)
class Fragment:
    """One box of one global tensor, with its data.

    `name` is the parameter's global name, `global_shape` the shape of the whole tensor. `kind` is master (the fp32
    weight), the name of a moment of the optimizer, or buffer (what is not trained). Low-precision weights are not
    stored: they are the master, rounded.
    """

    name: str
    kind: str
    global_shape: tuple[int, ...]
    box: Box
    tensor: Tensor

    @staticmethod
    def whole(name: str, kind: str, tensor: Tensor) -> "Fragment":
        """The fragment that is the whole tensor."""
        return Fragment(name, kind, tuple(tensor.shape), Box.whole(tensor.shape), tensor)


class FragmentSource(Protocol):
    """The source that an engine asks for the boxes that it needs."""

    def read(self, name: str, kind: str, box: Box) -> Tensor:
        """The data of a box, on the CPU, with the box's shape. Raises CheckpointError where it is not there."""
        ...

    def global_shape(self, name: str, kind: str) -> tuple[int, ...] | None:
        """Shape of the whole tensor, or None where the source has no such tensor."""
        ...
