"""The fp32 masters of a rank: what an optimizer steps, what is saved and what is loaded, the same for all engines."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llmtrain.engines.placement import Placement, iter_range_boxes, read_range
from llmtrain.errors import CheckpointError
from llmtrain.optim.table import OptimizerRow
from llmtrain.values.fragment import Fragment, FragmentSource


@dataclass(frozen=True)
class Master:
    """Elements [start, stop) of this rank's part of a parameter, flattened: fp32 weight, moments, gradient.

    Of a frozen parameter there is the weight alone, in the training precision.

    The tensors are the live ones, contiguous, flat or shaped as the part. `grad` is there between the reduction of a
    step's gradients and its update. `owned` says whether this rank, of all that hold these elements, is the one that
    counts them in norms and saves them.
    """

    placement: Placement
    span: tuple[int, int]
    weight: Tensor
    moments: Mapping[str, Tensor] = field(default_factory=dict)
    grad: Tensor | None = None
    owned: bool = True

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint has of it, by kind."""
        return {"master": self.weight, **self.moments}

    def fragments(self, kind: str, data: Tensor) -> Iterator[Fragment]:
        """Data of these elements as boxes of the global tensor."""
        flat, placement = data.detach().view(-1), self.placement
        for box, offset in iter_range_boxes(placement.box, *self.span):
            part = flat[offset : offset + box.num_elements].view(box.shape)
            yield Fragment(placement.name, kind, placement.global_shape, box, part)


def gradients_of(masters: Iterable[Master]) -> list[Tensor]:
    """Those that are there: a rank may have none of some, such as a pipeline stage of an expert that saw no token."""
    return [master.grad for master in masters if master.grad is not None]


def read_masters(source: FragmentSource, masters: Iterable[Master], kinds: Sequence[str]) -> None:
    """Replace weights and moments by what a source holds. Raises CheckpointError where it does not fit."""
    for master in masters:
        tensors = master.tensors()
        for kind in kinds:
            read_range(source, master.placement, kind, master.span, tensors[kind].detach().view(-1))


def require_moments(source: FragmentSource, masters: Iterable[Master], name: str) -> None:
    """Raise CheckpointError where a source has weights, and not the moments of the optimizer `name`."""
    for master in masters:
        parameter = master.placement.name
        missing = [kind for kind in master.moments if source.global_shape(parameter, kind) is None]
        if missing and source.global_shape(parameter, "master") is not None:
            raise CheckpointError(
                f"optim.name = {name}: the checkpoint has no {' and no '.join(missing)} of {parameter}, so another "
                "optimizer has written it. Set optim.name to that of its config.yaml. To train its weights on with "
                f"{name}, export it, import the export, and start a new run with checkpoint.resume=IMPORT."
            )


def make_state(optimizer: torch.optim.Optimizer, row: OptimizerRow, tensors: Iterable[Tensor]) -> None:
    """The state that an optimizer would make in its first step, for what it steps; what is there already stays."""
    for tensor in tensors:
        state = optimizer.state[tensor]
        if row.counts_updates and "step" not in state:
            state["step"] = torch.zeros((), device=tensor.device)
        for moment in row.moments:
            if moment not in state:
                state[moment] = torch.zeros_like(tensor, requires_grad=False)


def moments_of(optimizer: torch.optim.Optimizer, row: OptimizerRow, tensor: Tensor) -> dict[str, Tensor]:
    """The moments of a tensor that the optimizer steps."""
    state = optimizer.state[tensor]
    return {moment: state[moment] for moment in row.moments}


def cut(tensors: Mapping[str, Tensor], start: int, length: int) -> dict[str, Tensor]:
    """Elements [start, start + length) of each of some flat tensors."""
    return {name: tensor.view(-1).narrow(0, start, length) for name, tensor in tensors.items()}


def set_updates(optimizer: torch.optim.Optimizer, updates: int) -> None:
    """Tell an optimizer that counts its updates, for its bias correction, how many there have been."""
    for state in optimizer.state.values():
        if "step" in state:
            state["step"].fill_(updates)
