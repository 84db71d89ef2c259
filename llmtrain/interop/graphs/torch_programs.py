"""Graphs as programs of torch.export, which PyTorch and compilers for other devices load without our code."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmtrain.interop.graphs.ports import Graph, Stages

SMALLEST_TRACED = 2


def write_programs(folder: Path, graphs: Sequence[Graph], precision: str) -> Stages:
    """Write NAME.pt2 for each graph, which is run as it is read again.

    PyTorch's reader unpickles what a file may hold: these were written by this process.
    """
    modules = dict[str, Any]()
    for graph in graphs:
        path = folder / f"{graph.name}.pt2"
        torch.export.save(_for_short_texts(_bare(graph.program())), path)
        modules[graph.name] = torch.export.load(path).module()

    @torch.no_grad()
    def run(graph: Graph, inputs: Sequence[Tensor]) -> list[Tensor]:
        return list(modules[graph.name](*inputs))

    yield precision, run


def _bare(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The program without the places of our source files, which name folders of this machine."""
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                node.meta.pop("stack_trace", None)
    return program


def _for_short_texts(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """PyTorch takes every size that varies to be 2 or more. It checks no such bound of a single size, which may be 1 or
    0, but that of a sum, such as of all tokens of a text."""
    for size, bounds in program.range_constraints.items():
        if bounds.lower > SMALLEST_TRACED:
            program.range_constraints[size] = type(bounds)(SMALLEST_TRACED, bounds.upper)
    return program
