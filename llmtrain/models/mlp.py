"""The position-wise MLP, gated or not."""

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llmtrain.config.model import ModelConfig

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
