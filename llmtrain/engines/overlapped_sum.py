"""Gradients that are summed over ranks while the backward pass goes on (Li et al. 2020, section 3.2.3)."""

from collections import deque
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from llmtrain.engines.masters import BUCKET_ELEMENTS

MOST_UNDER_WAY = 4
"""Buckets that are summed at the same time: each has a copy of its gradients."""

UnderWay = tuple[list[Tensor], Tensor, dist.Work]
"""A bucket's gradients, the flat copy that is being summed, and the collective."""


class OverlappedSum:
    """The gradients of a model's masters, summed over a group in buckets, each as soon as its gradients are complete.

    Gradients are complete from the last layer to the first, and so are buckets made. They are summed in one order,
    whatever the order in which they are complete: every rank has to call the same collectives one after the other.
    """

    def __init__(self, masters: Iterable[Tensor], group: dist.ProcessGroup) -> None:
        self._group = group
        self._buckets: list[list[Tensor]] = [[]]
        self._bucket_of: dict[Tensor, int] = {}
        for master in reversed(list(masters)):
            if sum(held.numel() for held in self._buckets[-1]) >= BUCKET_ELEMENTS:
                self._buckets.append([])
            self._buckets[-1].append(master)
            self._bucket_of[master] = len(self._buckets) - 1
        self._missing: list[int] = []
        self._next = 0
        self._under_way: deque[UnderWay] = deque()

    def begin(self) -> None:
        """From here on gradients are complete when they are `ready`: the last backward pass of a step begins."""
        self._missing = [len(bucket) for bucket in self._buckets]
        self._next = 0

    def ready(self, master: Tensor) -> None:
        """The gradient of this step is complete on this rank. Before `begin`, nothing happens."""
        if not self._missing:
            return
        self._missing[self._bucket_of[master]] -= 1
        while self._next < len(self._buckets) and self._missing[self._next] == 0:
            self._start()

    @torch.no_grad()
    def _start(self) -> None:
        grads = [master.grad for master in self._buckets[self._next] if master.grad is not None]
        self._next += 1
        if grads:
            flat = torch.cat([grad.reshape(-1) for grad in grads])
            work = dist.all_reduce(flat, group=self._group, async_op=True)
            assert work is not None, "this rank is of the group"
            self._under_way.append((grads, flat, work))
        while len(self._under_way) > MOST_UNDER_WAY:
            self._finish_oldest()

    def _finish_oldest(self) -> None:
        grads, flat, work = self._under_way.popleft()
        work.wait()  # on a GPU the device waits, on a CPU the host
        for grad, total in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(total.view_as(grad))

    @torch.no_grad()
    def finish(self) -> None:
        """Sum what is left, such as buckets of which a weight had no gradient, and wait for all."""
        while self._next < len(self._buckets):
            self._start()
        while self._under_way:
            self._finish_oldest()
        self._missing = []
