"""The fp32 masters of a rank: where they lie in the global tensors, what an optimizer steps, what is saved and loaded.

The same for all engines.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llmtrain.config.parameters import FrozenNames
from llmtrain.errors import CheckpointError
from llmtrain.optim.table import OptimizerRow
from llmtrain.values.fragment import Box, Fragment, FragmentSource
from llmtrain.values.quantization import NumberPacking, Quantized, round_to_nearest, unless_rounded


@dataclass(frozen=True)
class Placement:
    """A parameter of this rank: its global name and shape, and the box of it that the rank holds.

    `owned` says whether this rank is the one, of the tensor ranks that hold the same box, that saves it; `replica` is
    its number among the ranks of the data and context axes that do. `packing`: it is rounded, and lies packed.
    """

    name: str
    global_shape: tuple[int, ...]
    box: Box
    owned: bool = True
    replica: int = 0
    packing: NumberPacking | None = None


def split_box(global_shape: tuple[int, ...], cuts: Mapping[int, tuple[int, int]]) -> Box:
    """One of the equal parts along some dimensions: `cuts` has, by dimension, its number and how many there are."""
    shape = tuple(size // cuts[dim][1] if dim in cuts else size for dim, size in enumerate(global_shape))
    return Box(tuple(cuts[dim][0] * size if dim in cuts else 0 for dim, size in enumerate(shape)), shape)


def iter_range_boxes(box: Box, start: int, stop: int) -> Iterator[tuple[Box, int]]:
    """The elements [start, stop) of a box's flattened self, as boxes of the global tensor with their place in it.

    At most 2n - 1 boxes for n dimensions: partial rows at both ends, whole rows between.
    """
    if stop <= start:
        return
    if len(box.shape) <= 1:
        offset = box.offsets[0] + start if box.shape else 0
        yield Box((offset,) if box.shape else (), (stop - start,) if box.shape else ()), 0
        return
    row = prod(box.shape[1:])
    first_whole, last_whole = -(-start // row), stop // row
    if first_whole > last_whole:  # inside one row
        yield from _row_boxes(box, start // row, start % row, stop - start // row * row, 0)
        return
    if start % row:
        yield from _row_boxes(box, first_whole - 1, start % row, row, 0)
    if last_whole > first_whole:
        offsets = (box.offsets[0] + first_whole, *box.offsets[1:])
        yield Box(offsets, (last_whole - first_whole, *box.shape[1:])), first_whole * row - start
    if stop % row:
        yield from _row_boxes(box, last_whole, 0, stop % row, last_whole * row - start)


def _row_boxes(box: Box, row: int, start: int, stop: int, place: int) -> Iterator[tuple[Box, int]]:
    inner = Box(box.offsets[1:], box.shape[1:])
    for part, offset in iter_range_boxes(inner, start, stop):
        yield Box((box.offsets[0] + row, *part.offsets), (1, *part.shape)), place + offset


def read_range(source: FragmentSource, placement: Placement, kind: str, span: tuple[int, int], target: Tensor) -> None:
    """Fill a flat tensor with the elements [start, stop) of this rank's part of a parameter.

    Raises CheckpointError where the source's tensor is not the model's.
    """
    require_shape(source, placement, kind)
    for box, place in iter_range_boxes(placement.box, *span):
        part = source.read(placement.name, kind, box)
        target[place : place + box.num_elements].copy_(part.flatten())


def read_packed(source: FragmentSource, placement: Placement, span: tuple[int, int], target: Tensor) -> None:
    """Fill a flat tensor with the elements [start, stop) of this rank's part of a parameter that lies packed.

    Rounded is as one process rounds: whole outputs are read, of which this rank keeps its inputs. Raises as
    `read_range`.
    """
    require_shape(source, placement, "master")
    packing, box, columns = placement.packing, placement.box, placement.global_shape[-1]
    assert packing is not None
    first, last = span[0] // packing.width, -(-span[1] // packing.width)
    outputs = Box((*box.offsets[:-1], 0), (*box.shape[:-1], columns))
    own = slice(box.offsets[-1], box.offsets[-1] + packing.inputs)
    group, parts = packing.grid.group or columns, [target[:0]]
    groups = slice(own.start // group, -(-own.stop // group))
    for part, _ in iter_range_boxes(outputs, first * columns, last * columns):
        weight_OI = source.read(placement.name, "master", part).reshape(-1, columns)
        matrix = round_to_nearest(weight_OI.to(packing.dtype), packing.grid, packing.dtype)
        if packing.keeps_rounded:
            matrix = unless_rounded(weight_OI, matrix, packing.grid)
        held = Quantized(matrix.numbers_OI[:, own].contiguous(), matrix.scale_OG[:, groups])
        parts.append(packing.packed(held).flatten().to(target.device))
    start = first * packing.width
    target.copy_(torch.cat(parts)[span[0] - start : span[1] - start])


def require_shape(source: FragmentSource, placement: Placement, kind: str) -> None:
    """Raise CheckpointError where the source's tensor is not the model's."""
    shape = source.global_shape(placement.name, kind)
    if shape != placement.global_shape:
        found = "no such tensor" if shape is None else f"shape {list(shape)}"
        raise CheckpointError(
            f"{kind} of {placement.name}: the model needs shape {list(placement.global_shape)}, the checkpoint has "
            f"{found}. It was written by another architecture: train with the model section of its config.yaml."
        )


@dataclass
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
        """The tensors of it that a checkpoint stores, by kind."""
        return {"master": self.weight, **self.moments}

    def fragments(self, kind: str, data: Tensor) -> Iterator[Fragment]:
        """Data of these elements as boxes of the global tensor."""
        flat, placement = data.detach().view(-1), self.placement
        for box, offset in iter_range_boxes(placement.box, *self.span):
            part = flat[offset : offset + box.num_elements].view(box.shape)
            yield Fragment(placement.name, kind, placement.global_shape, box, part)


def gradients_of(masters: Iterable[Master]) -> list[Tensor]:
    """The gradients that are present: a rank may lack some, such as those of an expert that saw no token."""
    return [master.grad for master in masters if master.grad is not None]


def read_masters(source: FragmentSource, masters: Iterable[Master], kinds: Sequence[str]) -> None:
    """Replace weights and moments by what a source holds. Raises CheckpointError where it does not fit."""
    for master in masters:
        tensors = master.tensors()
        if master.placement.packing is not None:
            read_packed(source, master.placement, master.span, master.weight.detach().view(-1))
            continue
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


def freeze(parameters: Mapping[str, nn.Parameter], frozen: FrozenNames) -> None:
    """Take the gradients away from parameters that are not trained: by that, engines know them."""
    for name, parameter in parameters.items():
        parameter.requires_grad_(name not in frozen)


def fp32_master(parameter: nn.Parameter) -> Tensor:
    """The tensor that an optimizer steps: the weight itself in fp32, else an fp32 copy that gathers its gradients.

    Each gradient is added to the copy's, in fp32, as soon as it is complete, and freed.
    """
    if parameter.dtype == torch.float32:
        return parameter
    master = parameter.detach().float()

    # The hook runs when a backward pass has completed the parameter's gradient: from then on nothing reads the
    # low-precision one, and it is freed before the next parameter's is there.
    def accumulate(parameter: Tensor) -> None:
        if parameter.grad is not None:
            if master.grad is None:
                master.grad = parameter.grad.float()
            else:
                master.grad.add_(parameter.grad)  # widened element by element: no fp32 copy of it is made
            parameter.grad = None

    parameter.register_post_accumulate_grad_hook(accumulate)
    return master


BUCKET_ELEMENTS = 1 << 24
"""fp32 gradients that are summed over ranks in one collective: 64 MiB, so that the copy of them stays small."""


def sum_over_ranks(tensors: Sequence[Tensor], group: dist.ProcessGroup) -> None:
    """Replace each tensor by its sum over the ranks, in buckets: one collective for many small tensors."""
    bucket: list[Tensor] = []
    for number, tensor in enumerate(tensors):
        bucket.append(tensor)
        if number == len(tensors) - 1 or sum(held.numel() for held in bucket) >= BUCKET_ELEMENTS:
            flat = torch.cat([held.reshape(-1) for held in bucket])
            dist.all_reduce(flat, group=group)
            for held, total in zip(bucket, flat.split([held.numel() for held in bucket]), strict=True):
                held.copy_(total.view_as(held))
            bucket = []
