"""Stages 1 and 2: each rank of the data and context axes holds an equal run of every flattened optimizer group."""

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from torch import Tensor, nn

from llmtrain.engines.deepspeed_engine.zero0 import Places
from llmtrain.engines.masters import Master, cut, make_state, moments_of
from llmtrain.optim.table import OptimizerRow


class Partitions:
    """The masters of DeepSpeed's optimizers for stages 1 and 2, in all precisions.

    Of bf16 without offload, stage 1 is another class, with other names for the same things.
    """

    averaged_over = 1

    def __init__(self, engine: Any, row: OptimizerRow, places: Places) -> None:
        self._engine = engine
        self._row = row
        self._placements = places
        self._zero = engine.optimizer
        self._optimizer = engine.basic_optimizer
        self._whole_gradients = isinstance(self._zero, BF16_Optimizer)
        if self._whole_gradients:
            self._flats: list[Tensor] = self._zero.fp32_groups_flat_partition
            groups = self._zero.bf16_groups
        else:
            self._flats = self._zero.single_partition_of_fp32_groups
            groups = self._zero.bit16_groups
        # Each parameter's record of its run in the flat partition; None where this rank has nothing of it.
        self._places: dict[nn.Parameter, Any] = {p: p._hp_mapping for p in chain(*groups) if p._hp_mapping is not None}
        make_state(self._optimizer, row, self._flats)  # before any step: checkpoints are loaded into it

    def resident(self, write: bool = False) -> Iterator[list[Master]]:
        grads = self._gradients()
        yield [self._master(parameter, place, grads.get(parameter)) for parameter, place in self._places.items()]

    def _master(self, parameter: nn.Parameter, place: Any, grad: Tensor | None) -> Master:
        start, length = place.lp_fragment_address.start, place.lp_fragment_address.numel
        # The moments that this record links to are there for the first group only: these are cut from the whole.
        whole = moments_of(self._optimizer, self._row, self._flats[place.param_group_index])
        moments = cut(whole, place.hp_fragment_address.start, length)
        assert grad is None or grad.numel() == length, (grad, place)
        placement = self._placements[parameter]
        return Master(placement, (start, start + length), place.hp_fragment, moments, grad, placement.owned)

    def _gradients(self) -> dict[nn.Parameter, Tensor]:
        """The gradient of each parameter's part on this rank, where there is one."""
        if self._whole_gradients:
            return self._cut_gradients(self._zero.fp32_groups_gradient_flat_partition)  # fp32 sums over micro-batches
        if self._zero.cpu_offload:
            return self._cut_gradients([flat.grad for flat in self._flats])  # on the CPU, beside the masters
        found: dict[nn.Parameter, Tensor] = {}
        for number, grads in self._zero.averaged_gradients.items():
            # Padding makes the partition as long as those of the other ranks: it belongs to no parameter.
            real = [grad for grad in grads or () if not getattr(grad, "_zero_padding", False)]
            # A rank that has nothing of a group has a gradient of zeros and no parameters.
            for parameter, grad in zip(self._zero.params_in_partition[number], real, strict=False):
                found[parameter] = grad.view(-1)
        return found

    def _cut_gradients(self, flats: Sequence[Tensor | None]) -> dict[nn.Parameter, Tensor]:
        found = {}
        for parameter, place in self._places.items():
            address, flat = place.hp_fragment_address, flats[place.param_group_index]
            if flat is not None:
                found[parameter] = flat.view(-1).narrow(0, address.start, address.numel)
        return found

    def reduce(self) -> None:
        """The last backward pass has done it."""

    def update(self) -> None:
        self._engine.step()
        assert not self._zero.overflow, "the norm was finite: SteppingEngine has checked"

    def drop(self) -> None:
        self._zero.zero_grad(set_to_none=True)
        if self._whole_gradients:
            return
        # What DeepSpeed forgets at the end of a step; where it skips a step itself, offloaded sums would stay.
        self._zero.micro_step_id = -1  # its first value: the next micro-batch overwrites sums instead of adding to them
        for number in list(self._zero.averaged_gradients):
            self._zero.averaged_gradients[number] = None
            self._zero.all_grad_tensors[number] = None
        if self._zero.cpu_offload:
            self._zero.reset_cpu_buffers()

    def round_weights(self) -> None:
        self._zero.update_lp_params()  # rounds this rank's partition, and gathers those of the others
