"""Counting what ranks say to each other: every collective, its calls and bytes, as torch dispatches it."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

NAMES = {
    "allreduce_": "all_reduce",
    "allreduce_coalesced_": "all_reduce",
    "_allgather_base_": "all_gather",
    "allgather_into_tensor_coalesced_": "all_gather",
    "reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "_reduce_scatter_base_": "reduce_scatter",
    "alltoall_base_": "all_to_all",
    "send": "send",
    "broadcast_": "broadcast",
}
"""Operators of c10d by what they are called here. `recv_` is the other end of `send`."""

IGNORED = {"recv_", "barrier"}


class Collectives(TorchDispatchMode):
    """While it is entered, counts collectives of this thread: (name, bytes of a call's larger side) -> calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[tuple[str, int]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func._schema.name.removeprefix("c10d::")
            if name not in IGNORED:
                sizes = [tensor.nbytes for argument in args[:2] for tensor in iter_tensors(argument)]
                whole = sum(sizes) if name in ("allreduce_", "allreduce_coalesced_") else max(sizes)
                self.calls[NAMES[name], whole] += 1
        return func(*args, **(kwargs or {}))


def iter_tensors(argument: Any) -> Iterator[torch.Tensor]:
    if isinstance(argument, torch.Tensor):
        yield argument
    elif isinstance(argument, list | tuple):
        for item in argument:
            yield from iter_tensors(item)
