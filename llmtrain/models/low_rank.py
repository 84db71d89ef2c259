"""Low-rank updates of linears: y = x W^T + scale (x A^T) B^T, of which A and B are trained (Hu et al. 2021).

Shape suffixes: S sequence, B micro-batch, H in, F out, R rank, P pairs of a token and an expert, E experts.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmtrain.models.compiled_graphs import dropped
from llmtrain.parallel.parts import WHOLE, SequenceParts
from llmtrain.parallel.stateless_random import Draws, Span


@dataclass(frozen=True, eq=False)
class Update:
    """The settings of a linear's update.

    `site` is where its dropout draws, of whose whole width [H] this rank holds `columns`; `parts` says which part of
    the sequence is at hand inside of a block. `leave` sums what the tensor ranks have made of their columns.
    """

    scale: float
    dropout: float
    site: Tensor
    columns: Span
    parts: SequenceParts = WHOLE
    leave: Callable[[Tensor], Tensor] | None = None

    def dropped(self, x_SBH: Tensor, draws: Draws | None) -> Tensor:
        """What goes into A."""
        if draws is None or self.dropout == 0.0:
            return x_SBH
        inside = self.parts.inside(x_SBH.shape[0] * self.parts.blocks)
        return dropped(x_SBH, self.dropout, self.site, draws.with_sequence(inside), self.columns)


class LowRank(nn.Module):
    """The part of a class of linears that adds an update. Made by `with_update`."""

    update: Update
    lora_a: Tensor
    lora_b: Tensor

    def forward(self, x_SBH: Tensor, draws: Draws | None = None) -> Tensor:
        y_SBF = super().forward(x_SBH)  # that of the linear
        with kept_as_part(x_SBH):
            low_SBR = F.linear(self.update.dropped(x_SBH, draws), self.lora_a)
        if self.update.leave is not None:
            low_SBR = self.update.leave(low_SBR)
        # One pass over the output: a product, a factor and a sum of their own would be three.
        rows, low_rows = y_SBF.flatten(0, -2), low_SBR.flatten(0, -2)
        return torch.addmm(rows, low_rows, self.lora_b.T, alpha=self.update.scale).view_as(y_SBF)


@contextmanager
def kept_as_part(x_SBH: Tensor) -> Iterator[None]:
    """What is kept here of a gathered sequence is this rank's part of it, where its block gathers it again."""
    again: Any = getattr(x_SBH, "gathered_again", None)
    if again is None:
        yield
    else:
        with torch.autograd.graph.saved_tensors_hooks(again.pack, again.unpack):
            yield


@cache
def low_rank_class(linear: type[nn.Module]) -> type[nn.Module]:
    """The class of a linear, torch's or megatron-core's, that adds an update."""
    return type(f"LowRank{linear.__name__}", (LowRank, linear), {})


def with_update(linear: nn.Module, update: Update, a_shape: tuple[int, ...], b_shape: tuple[int, ...]) -> None:
    """Add an update to a linear on the meta device.

    The linear becomes one of another class in place: its weight keeps its name, and what is computed stays inside of
    its own call, where ZeRO 3 has gathered all of its parameters.
    """
    linear.__class__ = low_rank_class(type(linear))
    added = cast(LowRank, linear)
    added.lora_a = nn.Parameter(torch.empty(a_shape, device="meta"))
    added.lora_b = nn.Parameter(torch.empty(b_shape, device="meta"))
    added.update = update


def projected(linear: nn.Module, x_SBH: Tensor, draws: Draws | None) -> Tensor:
    """The output of a linear, be there an update or not."""
    return linear(x_SBH, draws) if isinstance(linear, LowRank) else linear(x_SBH)
