"""A ring of context ranks, on which blocks go from each rank to the next until every rank has met those it needs."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, Work

Kind = Literal["blocks", "gradients"]

TAGS: dict[Kind, int] = {"blocks": 0, "gradients": 1}
"""Two kinds are under way at once, between the same two ranks where there are but two. gloo matches messages by tag;
NCCL, which knows no tags, by their order, which is the same on all ranks."""


@dataclass(frozen=True, eq=False)
class Transfer:
    """A block that leaves and one that comes."""

    works: list[Work]
    leaving: Tensor
    """Kept until it is gone."""
    coming: Tensor

    def wait(self) -> Tensor:
        """The block that has come; the one that left may be changed from here on. On a GPU its stream waits, not the
        host."""
        for work in self.works:
            work.wait()
        return self.coming


@dataclass(frozen=True)
class Ring:
    """The ranks of a group in their order, the first behind the last. `balanced` is how they cut sequences."""

    group: ProcessGroup
    balanced: bool = False

    @property
    def size(self) -> int:
        return self.group.size()

    @property
    def place(self) -> int:
        return self.group.rank()

    def shift(self, block: Tensor, by: int, kind: Kind) -> Transfer:
        """Send a contiguous block to the rank `by` places on, and take the one from as many places back.

        Returns at once. Every rank calls it with the same `by` and shape, in the same order.
        """
        coming, tag = torch.empty_like(block), TAGS[kind]
        # In one batch: through NCCL a send waits for its receive, and all ranks would send first.
        works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, block, group=self.group, tag=tag, group_peer=(self.place + by) % self.size),
                dist.P2POp(dist.irecv, coming, group=self.group, tag=tag, group_peer=(self.place - by) % self.size),
            ]
        )
        return Transfer(works, block, coming)
