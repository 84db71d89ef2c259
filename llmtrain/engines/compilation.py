"""Compiling layers without reading what somebody else may have written.

PyTorch keeps compiled graphs as pickles in a folder of fixed name under /tmp, and unpickles them without asking whose
they are. So graphs are compiled anew by each process, and what must lie in files lies in a folder of this user alone.
"""

import os
from collections.abc import Iterable
from pathlib import Path

from torch import nn

from llmtrain.data.remote import default_cache_dir

CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"


def compile_layers(layers: Iterable[nn.Module]) -> None:
    """Compile each layer in place; PyTorch does so when it is called first."""
    import torch._functorch.config as functorch_config
    import torch._inductor.config as inductor_config

    inductor_config.fx_graph_cache = False
    functorch_config.enable_autograd_cache = False
    if CACHE_VARIABLE not in os.environ:
        os.environ[CACHE_VARIABLE] = str(private_folder())
    for layer in layers:
        layer.compile()


def private_folder() -> Path:
    """Where this user's compiled kernels lie, which nobody else may write to."""
    folder = default_cache_dir() / "compiled"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)
    return folder
