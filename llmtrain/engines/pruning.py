"""Pruning in training: which masters become zero behind a step, and that they stay so.

There is no mask beside the weights: a weight of a target that is zero is pruned. It gets no gradient, and lost its
moments when it was pruned, so no optimizer that steps each element by itself moves it. So a resume in any layout, or
from an export, needs nothing but the weights. Which are pruned follows from magnitudes and global places alone.

Shape suffixes: N elements of a master, G groups of four.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor

from llmtrain.compress.sparsity import (
    GROUP,
    global_places,
    key_of_rank,
    magnitude_bits,
    magnitude_keys,
    pruned_of_four,
)
from llmtrain.config.finetune import PruneConfig
from llmtrain.config.parameters import pruned_linears
from llmtrain.config.schema import RunConfig
from llmtrain.engines.masters import Master
from llmtrain.values.progress import SPARSITY

Resident = Callable[[bool], Iterator[list[Master]]]
"""All masters of this rank, as `SteppingEngine.resident` has them."""


class Pruning:
    """The pruning of a run, on one rank."""

    def __init__(self, config: RunConfig, resident: Resident, device: torch.device) -> None:
        assert config.prune is not None, "an engine asks for it where there is one"
        self.config: PruneConfig = config.prune
        shapes = {weight.name: weight.shape for _, weight in pruned_linears(config.model, config.prune.targets)}
        self.numbers: Mapping[str, int] = {name: number for number, name in enumerate(shapes)}
        self.sizes = [prod(shape) for shape in shapes.values()]
        self.resident, self.device = resident, device

    def _targets(self, write: bool) -> Iterator[tuple[int, Master]]:
        for masters in self.resident(write):
            for master in masters:
                if master.placement.name in self.numbers:
                    yield self.numbers[master.placement.name], master

    @torch.no_grad()
    def keep_zeros(self, step: int) -> None:
        """Take the gradients of pruned weights away. Call when they are complete, before their norm is taken."""
        if self.config.keeps_zeros(step):
            for _, master in self._targets(write=True):
                if master.grad is not None:
                    master.grad.view(-1).masked_fill_(master.weight.view(-1) == 0, 0.0)

    @torch.no_grad()
    def prune(self, step: int) -> bool:
        """Prune behind a step, on all ranks at once; True where masters have changed."""
        if not self.config.prunes_behind(step):
            return False
        if self.config.kind == "2:4":
            self._prune_of_four()
        else:
            self._prune_smallest(self.config.sparsity_behind(step))
        return True

    def metrics(self, step: int) -> dict[str, float]:
        """What is known without counting; of zeros that are only kept, nothing is."""
        return {} if self.config.kind == "kept" else {SPARSITY: self.config.sparsity_behind(step)}

    def _prune_smallest(self, sparsity: float) -> None:
        counts_U = torch.tensor([int(sparsity * size) for size in self.sizes], dtype=torch.long, device=self.device)

        def owned() -> Iterator[tuple[int, Tensor]]:
            for number, master in self._targets(write=False):
                if master.owned:
                    yield number, _keys(master).to(self.device)

        limits_U = key_of_rank(owned, counts_U, _add_over_ranks)
        for number, master in self._targets(write=True):
            keys_N = _keys(master)
            _set_zero(master, keys_N <= limits_U[number].to(keys_N.device))

    def _prune_of_four(self) -> None:
        missing = _Neighbours.of(self._targets(write=False), self.device)
        for number, master in self._targets(write=True):
            start, stop = master.span
            first, last = start // GROUP * GROUP, -(-stop // GROUP) * GROUP
            bits_N = magnitude_bits(master.weight).view(-1).to(self.device)
            # What ZeRO has cut through the middle of a group lies on another rank.
            groups_N = torch.cat(
                (missing.bits(number, master, (first, start)), bits_N, missing.bits(number, master, (stop, last)))
            )
            pruned_N = pruned_of_four(groups_N.view(-1, GROUP)).view(-1)[start - first : len(groups_N) - (last - stop)]
            _set_zero(master, pruned_N.to(master.weight.device))


def _keys(master: Master) -> Tensor:
    weight_N, place = master.weight.view(-1), master.placement
    return magnitude_keys(weight_N, global_places(place.global_shape, place.box, master.span, weight_N.device))


def _set_zero(master: Master, pruned_N: Tensor) -> None:
    """Moments as well: with them a weight would go on moving."""
    for tensor in (master.weight, *master.moments.values()):
        tensor.view(-1).masked_fill_(pruned_N, 0.0)


def _add_over_ranks(counts: Tensor) -> None:
    if dist.is_initialized():
        dist.all_reduce(counts)


PLACE_LIMIT = 1 << 43
"""Of elements of one tensor, so that its number and a place make one whole number."""


@dataclass(frozen=True)
class _Neighbours:
    """The elements of all ranks that lie in groups which more than one rank has a part of: their places, ascending,
    and the bits of their magnitudes."""

    places: Tensor
    magnitudes: Tensor

    @staticmethod
    def of(targets: Iterator[tuple[int, Master]], device: torch.device) -> "_Neighbours":
        rows = [torch.zeros(0, 2, dtype=torch.long, device=device)]
        for number, master in targets:
            start, stop = master.span
            first_whole, last_whole = min(stop, -(-start // GROUP) * GROUP), stop // GROUP * GROUP
            for span in ((start, first_whole), (max(first_whole, last_whole), stop)):
                if master.owned and span[0] < span[1]:
                    bits = magnitude_bits(master.weight).view(-1)[span[0] - start : span[1] - start].to(device)
                    rows.append(torch.stack((_numbered(number, master, span, device), bits), 1))
        held = _gathered(torch.cat(rows))
        held = held[held[:, 0].argsort()]
        return _Neighbours(held[:, 0].contiguous(), held[:, 1].contiguous())

    def bits(self, number: int, master: Master, span: tuple[int, int]) -> Tensor:
        """The magnitudes of elements that another rank has."""
        wanted = _numbered(number, master, span, self.places.device)
        return self.magnitudes[torch.searchsorted(self.places, wanted)]


def _numbered(number: int, master: Master, span: tuple[int, int], device: torch.device) -> Tensor:
    place = master.placement
    return number * PLACE_LIMIT + global_places(place.global_shape, place.box, span, device)


def _gathered(own_N2: Tensor) -> Tensor:
    """The rows of all ranks."""
    if not dist.is_initialized():
        return own_N2
    most = torch.tensor(len(own_N2), device=own_N2.device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    padded = torch.nn.functional.pad(own_N2, (0, 0, 0, int(most) - len(own_N2)), value=-1)
    every = padded.new_empty(dist.get_world_size() * len(padded), 2)
    dist.all_gather_into_tensor(every, padded)
    return every[every[:, 0] >= 0]
