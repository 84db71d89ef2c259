"""Compiling layers."""

from collections.abc import Iterable

from torch import nn

from llmtrain.models.compiled_graphs import guard_compiled_graphs


def compile_layers(layers: Iterable[nn.Module]) -> None:
    """Compile each layer in place; PyTorch does so when it is called first."""
    guard_compiled_graphs()
    for layer in layers:
        layer.compile()
