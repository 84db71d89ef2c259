"""What every way of sharding has in common: fp32 masters with their moments and gradients; and the one that shards
nothing."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from llmtrain.parallel.all_reduce import sum_over_ranks

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Master:
    """The fp32 master of elements [start, stop) of a parameter's flattened self on this rank, flat, with its moments.

    `grad` is there between `reduce` and the update of a step.
    """

    parameter: nn.Parameter
    span: tuple[int, int]
    tensor: Tensor
    moments: Mapping[str, Tensor]
    grad: Tensor | None


class Sharding(Protocol):
    """The masters of this rank. Each of DeepSpeed's optimizers keeps them in its own places and pieces."""

    sharded: bool
    """Whether ranks of the data and context axes hold different elements."""

    averaged_over: int
    """What the gradients, summed over these ranks, have been divided by."""

    def resident(self, write: bool = False) -> Iterator[list[Master]]:
        """All masters, in lists of those that are in memory together, each until the next list is asked for.

        The order is the same every time, and on every tensor rank. What is changed is kept only where `write` says so.
        """
        ...

    def counts(self) -> Iterator[Tensor]:
        """The optimizer's counts of its updates, one for each of its tensors."""
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


def make_state(optimizer: torch.optim.Optimizer, tensors: Iterable[Tensor]) -> None:
    """The state that AdamW would make in its first step."""
    for tensor in tensors:
        moments = {kind: torch.zeros_like(tensor, requires_grad=False) for kind in MOMENTS}
        optimizer.state[tensor] = {"step": torch.zeros((), device=tensor.device), **moments}


def cut_moments(state: Mapping[str, Tensor], start: int, length: int) -> dict[str, Tensor]:
    """Elements [start, start + length) of each moment of a flat tensor."""
    return {kind: state[kind].view(-1).narrow(0, start, length) for kind in MOMENTS}


def fp32_masters(parameters: Iterable[nn.Parameter]) -> dict[nn.Parameter, Tensor]:
    """What the optimizer of stage 0 steps: each parameter, or an fp32 copy that gathers its gradients in fp32.

    DeepSpeed's own low-precision optimizers for this stage would accumulate gradients in low precision.
    """
    return {p: p if p.dtype == torch.float32 else fp32_master(p) for p in parameters}


def fp32_master(parameter: nn.Parameter) -> Tensor:
    """A copy to which each gradient of the parameter is added, once complete, before it is freed."""
    master = parameter.detach().float()

    def accumulate(parameter: nn.Parameter) -> None:
        if parameter.grad is not None:
            grad = parameter.grad.float()
            master.grad = grad if master.grad is None else master.grad.add_(grad)
            parameter.grad = None

    parameter.register_post_accumulate_grad_hook(accumulate)
    return master


class Replicated:
    """Stage 0: every rank holds all masters of its part of the model, and gradients are summed once per step."""

    sharded = False
    averaged_over = 1

    def __init__(
        self, engine: Any, masters: dict[nn.Parameter, Tensor], groups: Mapping[nn.Parameter, ProcessGroup]
    ) -> None:
        """`groups`: the ranks that hold the same part of each parameter."""
        engine.enable_backward_allreduce = False  # it would reduce the parameters' gradients, not the masters'
        self._engine = engine
        self._optimizer = engine.basic_optimizer
        self._masters = masters
        self._groups = groups
        make_state(self._optimizer, masters.values())

    def resident(self, write: bool = False) -> Iterator[list[Master]]:
        yield [
            Master(parameter, (0, tensor.numel()), tensor.detach().view(-1), self._moments(tensor), flat(tensor.grad))
            for parameter, tensor in self._masters.items()
        ]

    def _moments(self, tensor: Tensor) -> dict[str, Tensor]:
        return cut_moments(self._optimizer.state[tensor], 0, tensor.numel())

    def counts(self) -> Iterator[Tensor]:
        for tensor in self._masters.values():
            yield self._optimizer.state[tensor]["step"]

    def reduce(self) -> None:
        by_group: dict[ProcessGroup, list[Tensor]] = {}
        for parameter, tensor in self._masters.items():
            if tensor.grad is not None:
                by_group.setdefault(self._groups[parameter], []).append(tensor.grad)
        for group, grads in by_group.items():
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


def flat(grad: Tensor | None) -> Tensor | None:
    """A gradient as a flat view."""
    return None if grad is None else grad.view(-1)
