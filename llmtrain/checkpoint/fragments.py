"""Fragments: pieces of training state, named by where they lie in the whole run and not by who held them."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

KINDS = ("master", "exp_avg", "exp_avg_sq", "buffer")
"""fp32 master weights, Adam's two moments, and state that is not trained. Low-precision weights are the master, rounded."""


@dataclass(frozen=True)
class Box:
    """A rectangular part of a global tensor: element i of dimension d lies at offsets[d] + i."""

    offsets: tuple[int, ...]
    shape: tuple[int, ...]

    @staticmethod
    def whole(shape: Iterable[int]) -> "Box":
        shape = tuple(shape)
        return Box((0,) * len(shape), shape)


@dataclass(frozen=True)
class Fragment:
    """One box of one global tensor, with its data.

    `name` is the parameter's global name, `kind` one of KINDS, `global_shape` the shape of the whole tensor.
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
    """Where an engine asks for the boxes that it needs."""

    def read(self, name: str, kind: str, box: Box) -> Tensor:
        """The data of a box, on the CPU, with the box's shape. Raises CheckpointError where it is not there."""
        ...

    def global_shape(self, name: str, kind: str) -> tuple[int, ...] | None:
        """Shape of the whole tensor, or None where the source has no such tensor."""
        ...
