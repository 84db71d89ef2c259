"""Linears that multiply in float8: torchao's in place of torch's, in the layers alone.

A tensor is multiplied by a scale that brings its largest value to float8's (Micikevicius et al. 2022, section 3), anew
in each product: e4m3 for activations and weights, e5m2 for gradients. Sums are kept in fp32, results in bf16. The scale
of an activation is that of a rank's whole micro-batch: so the layout must not cut one.
"""

from dataclasses import replace
from importlib.util import find_spec

import torch
from torch import nn

from llmtrain.config.rules.precision import FLOAT8_MULTIPLE
from llmtrain.errors import ConfigError, Problem

CAPABILITY = (8, 9)
"""The compute capability of the first GPUs that multiply in float8: Ada, before Hopper."""


def require_float8(device: torch.device) -> None:
    """Raise ConfigError where a device does not multiply in float8, or nothing is installed that does it."""
    problem = ""
    if device.type != "cuda":
        problem = "needs a GPU, and this rank has the CPU. Try bf16."
    elif (found := torch.cuda.get_device_capability(device)) < CAPABILITY:
        ours, needed = (".".join(map(str, each)) for each in (found, CAPABILITY))
        name = torch.cuda.get_device_name(device)
        problem = f"needs a GPU of compute capability {needed} or more, and {name} has {ours}. Try bf16."
    elif find_spec("torchao") is None:
        problem = "needs torchao, which is not installed. Run pip install 'llmtrain[fp8]', or try bf16."
    if problem:
        raise ConfigError([Problem("train.precision", problem, "fp8")])


def multiply_in_float8(model: nn.Module) -> None:
    """Let the linears of a model's layers multiply in float8; embeddings, head, routers and experts do not.

    Parameters stay the same objects under the same names. Without a GPU the values are rounded to float8, and
    multiplied in bf16. Call when the model has torch's linears, and before it is compiled.
    """
    # Seconds of import, and a package of an extra, for this precision alone.
    from torchao.float8 import (  # pyright: ignore[reportMissingImports]
        Float8LinearConfig,
        convert_to_float8_training,
    )

    config = replace(Float8LinearConfig.from_recipe_name("tensorwise"), emulate=not torch.cuda.is_available())
    convert_to_float8_training(model, config=config, module_filter_fn=is_in_float8)


def is_in_float8(module: nn.Module, name: str) -> bool:
    """True for a linear that multiplies in float8; config/rules/precision.py has seen to it that its sizes fit."""
    if not isinstance(module, nn.Linear) or ".layers." not in name or ".moe." in name:
        return False
    assert module.in_features % FLOAT8_MULTIPLE == module.out_features % FLOAT8_MULTIPLE == 0, name
    return True
