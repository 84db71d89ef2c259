"""A model as a graph: a module that takes and returns plain tensors, with their names and sizes.

Sizes are numbers, or words for what is only known when the graph runs: `batch`, `length` (new tokens), `past` (tokens
that came before), `total` (both together), `source` (tokens that an encoder has read).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

SIZES = {"batch": 2, "length": 3, "past": 5, "total": 8, "source": 7}
"""Of the tensors that a graph is made with. None is 1, which would be taken for a size that never changes."""

PortKind = Literal["ids", "mask", "types", "number"]


@dataclass(frozen=True)
class Port:
    """A tensor that goes into a graph or comes out of it."""

    name: str
    dims: tuple[str | int, ...]
    kind: PortKind = "number"
    dtype: torch.dtype = torch.float32

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        return tuple(sizes[dim] if isinstance(dim, str) else dim for dim in self.dims)

    def example(self, sizes: Mapping[str, int]) -> Tensor:
        """A tensor of these sizes: of a mask ones, else zeros."""
        make = torch.ones if self.kind == "mask" else torch.zeros
        return make(self.shape(sizes), dtype=self.dtype)


@dataclass(frozen=True)
class Graph:
    """One of a model's graphs; `name` is that of its file."""

    name: str
    module: nn.Module
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    exact: tuple[type[nn.Module], ...] = ()
    """Kinds of modules in it whose weights are never rounded to whole numbers."""

    @property
    def exact_names(self) -> frozenset[str]:
        """Their names in the module."""
        return frozenset(name for name, module in self.module.named_modules() if isinstance(module, self.exact))

    @property
    def memory(self) -> tuple[Port, ...]:
        """The inputs that a first call has none of: what earlier calls have returned as `present`."""
        return tuple(port for port in self.inputs if port.name.startswith(PAST))

    def program(self) -> torch.export.ExportedProgram:
        """The graph as PyTorch traces it, for any sizes."""
        dynamic = tuple(
            {place: torch.export.Dim.DYNAMIC for place, dim in enumerate(port.dims) if isinstance(dim, str)}
            for port in self.inputs
        )
        examples = tuple(port.example(SIZES) for port in self.inputs)
        return torch.export.export(self.module, examples, dynamic_shapes={"tensors": dynamic}, strict=False)


PAST, PRESENT = "past_key_values", "present"
"""First parts of names, as Hugging Face's ONNX models have them."""

Run = Callable[[Graph, Sequence[Tensor]], list[Tensor]]
"""Runs a graph on tensors in the order of its inputs; returns its outputs."""

Stages = Iterator[tuple[str, Run]]
"""What runs the files of graphs as they are so far, and the type of their weights. Those that will be whole numbers are
fp32 first: so a graph is proved exactly, and rounding measured apart from it."""
