"""The layers that treat each position by itself: norms, activations and the MLP.

Norms compute their statistics in fp32 whatever the type of the activations.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llmtrain.config.model import ModelConfig
from llmtrain.models.low_rank import projected
from llmtrain.parallel.stateless_random import Draws


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


Recompute = Literal["none", "selective", "full"]
"""What is computed again in the backward pass: nothing, activations and attention kernels, or whole layers."""


def keeps_less(x: Tensor) -> bool:
    """True where the product of an activation is computed again even so: on a GPU that is a pass over memory beside two
    matrix products, on a CPU it is noticeable. A compiled layer chooses by itself what it computes again."""
    return x.is_cuda and not torch.compiler.is_compiling()


@contextmanager
def computed_again(product: Tensor, compute: Callable[[], Tensor]) -> Iterator[None]:
    """What is done here with `product` keeps for the backward pass how it is computed, in place of itself."""
    memory = product.untyped_storage().data_ptr()

    def pack(kept: Tensor) -> Any:
        if kept.untyped_storage().data_ptr() != memory:
            return kept
        return kept.size(), kept.stride(), kept.storage_offset()  # a linear keeps a view of it

    def unpack(kept: Any) -> Tensor:
        return kept if isinstance(kept, Tensor) else compute().as_strided(*kept)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def activated(
    activate: Callable[..., Tensor], project: Callable[[Tensor], Tensor], inputs: Sequence[Tensor], recompute: Recompute
) -> Tensor:
    """project(activate(*inputs)). Unless it keeps all, the activation keeps its inputs and nothing else."""
    # Whole layers that are computed again keep nothing now: what is noted here would outlive their first pass.
    less = recompute != "full" and keeps_less(inputs[0])
    if not (less or recompute == "selective"):
        return project(activate(*inputs))
    inner = checkpoint(activate, *inputs, use_reentrant=False, preserve_rng_state=False)
    if not less:
        return project(inner)
    with computed_again(inner, lambda: activate(*(x.detach() for x in inputs))):
        return project(inner)


class MLP(nn.Module):
    """down(f(up(x))), or down(f(gate(x)) * up(x)) where the activation is gated."""

    def __init__(self, config: ModelConfig, recompute: Recompute = "none") -> None:
        super().__init__()
        self.pointwise = build_pointwise(config)
        self.recompute: Recompute = recompute
        self.gate = nn.Linear(config.hidden_size, config.ffn_size, bias=config.bias) if config.gated else None
        self.up = nn.Linear(config.hidden_size, config.ffn_size, bias=config.bias)
        self.down = nn.Linear(config.ffn_size, config.hidden_size, bias=config.bias)

    def forward(self, x_SBH: Tensor, draws: Draws | None = None) -> Tensor:
        """`draws` are those of updates that drop a part of what goes into them."""
        inputs = [projected(linear, x_SBH, draws) for linear in (self.up, self.gate) if linear is not None]
        recompute = self.recompute if self.training else "none"
        return activated(self.activate, lambda inner: projected(self.down, inner, draws), inputs, recompute)

    def activate(self, up: Tensor, gate: Tensor | None = None) -> Tensor:
        return self.pointwise(up) if gate is None else self.pointwise(gate) * up


def identity(x: Tensor) -> Tensor:
    return x
