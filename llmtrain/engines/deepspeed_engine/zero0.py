"""The seam of DeepSpeed's stages: fp32 masters with moments and gradients. And stage 0, which shards nothing.

`engine.basic_optimizer` is the optimizer that we have built, `engine.optimizer` DeepSpeed's own around it. The names
that the stages read there are private: they hold for the version that pyproject.toml pins, and tests/parity would fail.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from llmtrain.engines.masters import Master, Placement, make_state, moments_of, sum_over_ranks
from llmtrain.optim.table import OptimizerRow

Places = Mapping[nn.Parameter, Placement]
"""The place of each parameter of this rank in the global tensors."""


class Sharding(Protocol):
    """The masters of this rank. Each of DeepSpeed's optimizers keeps them in its own places and pieces."""

    averaged_over: int
    """The number that the gradients, summed over these ranks, have been divided by."""

    def resident(self, write: bool = False) -> Iterator[list[Master]]:
        """All masters, in lists of those that are in memory together, each until the next list is asked for.

        The order is the same every time, and on every tensor rank. What is changed is kept only where `write` says so.
        """
        ...

    def reduce(self) -> None:
        """Complete the gradients after the last backward pass of a step, where that pass has not."""
        ...

    def update(self) -> None:
        """Step the optimizer with the gradients as they are, round the weights and gather them."""
        ...

    def drop(self) -> None:
        """Forget the gradients of a step that is skipped."""
        ...

    def round_weights(self) -> None:
        """Copy the masters to the weights that the model computes with, on all ranks."""
        ...


class Replicated:
    """Stage 0: every rank holds all masters of its part of the model, and gradients are summed once per step."""

    averaged_over = 1

    def __init__(
        self,
        engine: Any,
        row: OptimizerRow,
        places: Places,
        masters: Mapping[nn.Parameter, Tensor],
        groups: Mapping[nn.Parameter, ProcessGroup],
    ) -> None:
        """`masters`: what the optimizer steps. `groups`: the ranks that hold the same part of each parameter."""
        engine.enable_backward_allreduce = False  # it would reduce the parameters' gradients, not the masters'
        self._row = row
        self._optimizer = engine.basic_optimizer  # stage 0 has no optimizer of DeepSpeed's around it
        self._places = places
        self._masters = masters
        self._groups = groups
        make_state(self._optimizer, row, masters.values())

    def resident(self, write: bool = False) -> Iterator[list[Master]]:
        yield [
            Master(
                place := self._places[parameter],
                (0, tensor.numel()),
                tensor.detach(),
                moments_of(self._optimizer, self._row, tensor),
                tensor.grad,
                owned=place.owned and place.replica == 0,
            )
            for parameter, tensor in self._masters.items()
        ]

    def reduce(self) -> None:
        by_group: dict[ProcessGroup, list[Tensor]] = {}
        for parameter, tensor in self._masters.items():
            if tensor.grad is not None:
                by_group.setdefault(self._groups[parameter], []).append(tensor.grad)
        for group, grads in by_group.items():  # the parameters' order, which is that of all ranks of a group
            sum_over_ranks(grads, group)

    def update(self) -> None:
        self._optimizer.step()
        self.drop()
        self.round_weights()

    def drop(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def round_weights(self) -> None:
        for parameter, tensor in self._masters.items():
            if tensor is not parameter:
                parameter.copy_(tensor)
