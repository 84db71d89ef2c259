"""The parts of the sequence that ranks hold outside of attention and MLP: those of context and of sequence parallel.

Shape suffixes: s this rank's part of the sequence, S the whole.
"""

from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class SequenceParts:
    """This rank's part: number `place` of `count` equal ones. `groups` hold the others, neighbours first."""

    place: int = 0
    count: int = 1
    groups: tuple[ProcessGroup, ...] = ()

    def own(self, length: int) -> slice:
        """Where this rank's part lies in a sequence of `length`."""
        size = length // self.count
        return slice(self.place * size, (self.place + 1) * size)

    def block(self, length: int, size: int) -> slice:
        """The run of `size` that this rank's part lies in: what it holds inside of a block."""
        start = self.own(length).start // size * size
        return slice(start, start + size)

    def gather(self, x_s: Tensor) -> Tensor:
        """The whole sequence, along the first dimension, from all parts. Gradients do not pass."""
        whole = x_s.detach()
        for group in self.groups:
            parts = whole.new_empty(whole.shape[0] * group.size(), *whole.shape[1:])
            dist.all_gather_into_tensor(parts, whole.contiguous(), group=group)
            whole = parts
        return whole


WHOLE = SequenceParts()
"""One rank holds everything."""
