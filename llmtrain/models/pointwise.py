"""The layers that treat each position by itself: norms, activations and the MLP.

Norms compute their statistics in fp32 whatever the type of the activations.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llmtrain.config.model import ModelConfig


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight (Zhang and Sennrich 2019, eq. 4)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(variance + eps) * weight + bias (Ba, Kiros and Hinton 2016, eq. 4)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size))
        self.bias = nn.Parameter(torch.empty(size))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


NORMS: dict[str, Callable[[int, float], nn.Module]] = {"rmsnorm": RMSNorm, "layernorm": LayerNorm}


def build_norm(config: ModelConfig) -> nn.Module:
    """The norm over the residual stream that the configuration names."""
    return NORMS[config.norm](config.hidden_size, config.norm_eps)


POINTWISE: dict[str, Callable[..., Tensor]] = {
    "swiglu": F.silu,
    "geglu": F.gelu,
    "reglu": F.relu,
    "gelu": F.gelu,
    "relu": F.relu,
}


def build_pointwise(config: ModelConfig) -> Callable[[Tensor], Tensor]:
    """The activation's function of one value (gated ones: Shazeer 2020, eq. 5)."""
    function = POINTWISE[config.activation]
    return partial(function, approximate=config.gelu_approximate) if function is F.gelu else function


class MLP(nn.Module):
    """down(f(up(x))), or down(f(gate(x)) * up(x)) where the activation is gated."""

    def __init__(self, config: ModelConfig, recompute_activation: bool = False) -> None:
        super().__init__()
        self.pointwise = build_pointwise(config)
        self.recompute_activation = recompute_activation
        self.gate = nn.Linear(config.hidden_size, config.ffn_size, bias=config.bias) if config.gated else None
        self.up = nn.Linear(config.hidden_size, config.ffn_size, bias=config.bias)
        self.down = nn.Linear(config.ffn_size, config.hidden_size, bias=config.bias)

    def forward(self, x_SBH: Tensor) -> Tensor:
        up = self.up(x_SBH)
        gate = None if self.gate is None else self.gate(x_SBH)
        if self.recompute_activation and self.training:
            inner = checkpoint(self.activate, up, gate, use_reentrant=False, preserve_rng_state=False)
        else:
            inner = self.activate(up, gate)
        return self.down(inner)

    def activate(self, up: Tensor, gate: Tensor | None) -> Tensor:
        return self.pointwise(up) if gate is None else self.pointwise(gate) * up


def identity(x: Tensor) -> Tensor:
    return x
