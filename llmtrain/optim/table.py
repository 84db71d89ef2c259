"""Every optimizer: how it is built, what it keeps of each weight, and how much that is.

A row is all that engines, checkpoints, disk space and memory advice know of an optimizer. Imports no torch: the
arithmetic before a run reads it too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from llmtrain.config.schema import OptimConfig

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

FP32_BYTES = 4

Groups = Sequence[dict[str, Any]]
"""Parameters and their settings, as torch's optimizers take them."""

Shape = tuple[int, ...]


@dataclass(frozen=True)
class OptimizerRow:
    """The facts about an optimizer.

    `moments` are the names of its fp32 tensors per weight, as torch's optimizer state has them. `counts_updates` says
    that its state has the number of updates as well, `step`; `divides` says that its step divides gradients by the
    tensor `grad_scale`, its attribute, in the pass over them that it makes anyway. `scope` is element where a weight's
    update follows from its own gradient alone, so that any part of a tensor may be stepped anywhere; matrix where it
    takes whole matrices. `moment_shape` gives the shape of a moment from its name and the weight's shape.
    """

    build: Callable[[Groups, OptimConfig], Optimizer]
    moments: tuple[str, ...]
    counts_updates: bool
    divides: bool = False
    scope: Literal["element", "matrix"] = "element"
    moment_shape: Callable[[str, Shape], Shape] = lambda moment, shape: shape

    @property
    def state_bytes(self) -> int:
        """Bytes of moments per parameter."""
        return FP32_BYTES * len(self.moments)

    @property
    def stored_bytes(self) -> int:
        """Bytes of a checkpoint per trained parameter: the fp32 master and its moments."""
        return FP32_BYTES + self.state_bytes


def parameter_groups(parameters: Mapping[str, Tensor], optim: OptimConfig) -> list[dict[str, Any]]:
    """Optimizer groups of parameters by name, one for each learning rate and decay.

    Matrices and embeddings decay towards zero; biases and norm weights, all vectors, do not. `lr_scale` is what a
    step's learning rate is multiplied by.
    """
    groups: dict[tuple[float, bool], list[Tensor]] = {}
    for name, parameter in parameters.items():
        groups.setdefault((optim.scale_of(name), parameter.dim() < 2), []).append(parameter)
    return [
        {"params": groups[key], "weight_decay": 0.0 if key[1] else optim.weight_decay, "lr_scale": key[0]}
        for key in sorted(groups)
    ]


def build_adamw(groups: Groups, optim: OptimConfig) -> Optimizer:
    from torch.optim import AdamW

    return AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)


def build_lion(groups: Groups, optim: OptimConfig) -> Optimizer:
    from llmtrain.optim.lion import Lion

    return Lion(groups, lr=optim.lr, betas=optim.betas)


OPTIMIZERS = {
    "adamw": OptimizerRow(build_adamw, ("exp_avg", "exp_avg_sq"), counts_updates=True, divides=True),
    "lion": OptimizerRow(build_lion, ("exp_avg",), counts_updates=False),
}
"""By optim.name. A test holds the names to those of the schema and of the table of engines."""


def row_of(optim: OptimConfig) -> OptimizerRow:
    """The row of a configuration's optimizer."""
    return OPTIMIZERS[optim.name]
