"""How two checkpoints differ, tensor by tensor, whatever layouts they were saved in."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from llmtrain.checkpoint.reader import CheckpointReader
from llmtrain.values.fragment import Box


@dataclass(frozen=True)
class TensorDifference:
    """What became of one kind of a tensor. `result` is equal, different, or says why they cannot be compared; `max_abs`
    is the largest difference of different ones."""

    name: str
    kind: str
    max_abs: float | None
    result: str


def tensor_differences(first: CheckpointReader, second: CheckpointReader) -> Iterator[TensorDifference]:
    """Every tensor of both, by name and kind, compared bit by bit."""
    left = {(tensor.name, tensor.kind): tensor for tensor in first.tensors()}
    right = {(tensor.name, tensor.kind): tensor for tensor in second.tensors()}
    for name, kind in sorted(left.keys() | right.keys()):
        one, other, max_abs = left.get((name, kind)), right.get((name, kind)), None
        if one is None or other is None:
            result = "only in A" if other is None else "only in B"
        elif (one.dtype, one.shape) != (other.dtype, other.shape):
            result = f"{one.dtype} {list(one.shape)} and {other.dtype} {list(other.shape)}"
        else:
            a, b = (reader.read(name, kind, Box.whole(one.shape)).reshape(-1) for reader in (first, second))
            result = "equal" if torch.equal(a.view(torch.uint8), b.view(torch.uint8)) else "different"
            if result == "different":
                max_abs = (a.double() - b.double()).abs().max().item()
        yield TensorDifference(name, kind, max_abs, result)
