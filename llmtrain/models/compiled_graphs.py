"""Compiled graphs: what is kept out of them, and a folder for them that nobody else can write to.

PyTorch keeps compiled graphs as pickles in a folder of fixed name under /tmp, and unpickles them without asking whose
they are. So graphs are compiled anew by each process, and what must lie in files lies in a folder of this user alone.

The compiler takes seconds to import: nothing here does so before something is compiled.
"""

import os
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from platformdirs import user_cache_path
from torch import Tensor, nn

from llmtrain.parallel.stateless_random import Draws, Span, dropout_hidden

CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"


def outside_of_graphs(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function that torch.compile shall not look into; inside of a compiled layer the graph ends there."""
    if torch.compiler.is_compiling():
        return torch.compiler.disable(function)(*arguments)
    return function(*arguments)


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that is compiled by itself, for the sizes at hand, where layers are not compiled."""
    guard_compiled_graphs()
    return torch.compile(function, dynamic=False)


def guard_compiled_graphs() -> None:
    """Keep graphs out of shared caches. Call before anything is compiled."""
    import torch._functorch.config as functorch_config
    import torch._inductor.config as inductor_config

    inductor_config.fx_graph_cache = False
    functorch_config.enable_autograd_cache = False
    if CACHE_VARIABLE not in os.environ:
        os.environ[CACHE_VARIABLE] = str(private_folder())


def private_folder() -> Path:
    """The folder of this user's compiled kernels, which nobody else may write to."""
    folder = user_cache_path("llmtrain") / "compiled"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)
    return folder


def compile_layers(layers: Iterable[nn.Module]) -> None:
    """Compile each layer in place; PyTorch does so when it is called first."""
    guard_compiled_graphs()
    for layer in layers:
        layer.compile()


def is_fused(x: Tensor) -> bool:
    """True where the twenty operations on integers of a dropout are to be one kernel: on a GPU each of them would pass
    over eight bytes for every element. A compiled layer makes them one by itself."""
    return x.is_cuda and not torch.compiler.is_compiling()


def dropped(
    x_SBH: Tensor, probability: float, site: Tensor, draws: Draws | None, columns: Span | None = None
) -> Tensor:
    """`dropout_hidden`, as one kernel where that is faster; the same elements either way."""
    if draws is None or probability == 0.0:
        return x_SBH
    drop = compiled(dropout_hidden) if is_fused(x_SBH) else dropout_hidden
    return drop(x_SBH, probability, site, draws, columns)
