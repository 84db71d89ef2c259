"""Attributes on parameters by which megatron-core knows who holds what. Set after a model has memory."""

from torch import nn


def mark_parameter(parameter: nn.Parameter, split_dim: int | None, sequence: bool, expert: bool = False) -> None:
    """`split_dim`: along which it is split over tensor ranks (None: whole). `sequence`: sequence parallelism is on.
    `expert`: other ranks of the data and context axes may hold other experts.

    A whole parameter used on a part of the sequence has a partial gradient on each rank, to be summed.
    """
    marks = {"tensor_model_parallel": split_dim is not None, "partition_dim": -1 if split_dim is None else split_dim}
    marks |= {"partition_stride": 1, "sequence_parallel": sequence and split_dim is None, "allreduce": not expert}
    for name, value in marks.items():
        setattr(parameter, name, value)
