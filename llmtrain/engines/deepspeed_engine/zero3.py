"""Stage 3: each rank of the data and context axes holds an equal run of every parameter, of its master and moments."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from llmtrain.engines.deepspeed_engine.zero0 import Places
from llmtrain.engines.masters import Master, Placement, cut, make_state, moments_of
from llmtrain.optim.table import OptimizerRow


class PartitionedWeights:
    """The masters of DeepSpeed's optimizer for stage 3; with NVMe offload they are in memory one group at a time."""

    def __init__(self, engine: Any, row: OptimizerRow, places: Places) -> None:
        self._engine = engine
        self._row = row
        self._placements = places
        self._zero = engine.optimizer
        self._optimizer = engine.basic_optimizer
        self.averaged_over: int = self._zero.partition_count
        self._flats: list[Tensor] = self._zero.fp32_partitioned_groups_flat
        for number, tensor in enumerate(self._flats):
            swaps = self._zero._swappable_optimizer_subgroup(number)  # the small ones stay in memory under NVMe offload
            if swaps:
                self._zero._optimizer_states_and_gradient_swap_in(number)
            make_state(self._optimizer, row, [tensor])
            if swaps:  # with what was made: the next reading finds it in the file
                self._zero._optimizer_states_and_gradient_swap_out(number)

    def resident(self, write: bool = False) -> Iterator[list[Master]]:
        for number in range(len(self._flats)):
            swaps = self._zero._swappable_optimizer_subgroup(number)
            if swaps:
                self._zero._optimizer_states_and_gradient_swap_in(number)
            yield list(self._masters(number))
            if swaps and write:
                self._zero._writeback_swap_state(number, write_opt_state=True, write_gradients=True)
            elif swaps:  # without writing: nothing was changed
                self._zero._release_swap_buffers(number)

    def _masters(self, number: int) -> Iterator[Master]:
        flat = self._flats[number]
        moments = moments_of(self._optimizer, self._row, flat)
        offset = 0
        # `fp16_groups` are the parameters of any precision. Stage 3 has written `ds_*` on them: their group, and their
        # whole number of elements, since a partitioned parameter has none itself.
        for index, parameter in enumerate(self._zero.fp16_groups[number]):
            held = parameter.partition_numel()
            start = parameter.ds_process_group.rank() * held
            length = min(held, parameter.ds_numel - start)  # the last ranks' parts are padded
            if length > 0:
                grad = self._gradient(number, index, offset)
                part = None if grad is None else grad.narrow(0, 0, length)
                placement, weight = self._placements[parameter], flat.detach().narrow(0, offset, length)
                held_moments = cut(moments, offset, length)
                yield Master(placement, (start, start + length), weight, held_moments, part, placement.owned)
            offset += held

    def _gradient(self, number: int, index: int, offset: int) -> Tensor | None:
        """The gradient of one parameter's part, with padding at its end."""
        if self._zero.offload_optimizer:
            grad = self._flats[number].grad
            return None if grad is None else grad.narrow(0, offset, grad.numel() - offset)
        grads = self._zero.averaged_gradients.get(number)
        return None if grads is None else grads[index]

    def reduce(self) -> None:
        """The backward passes have done it."""

    def update(self) -> None:
        self._engine.step()
        assert not self._zero.overflow, "the norm was finite: SteppingEngine has checked"

    def drop(self) -> None:
        # DeepSpeed's own calls where it skips a step, in its order: counters back to the first micro-batch, gathered
        # weights away, gradients forgotten (the number is the loss scale, which it only reports).
        self._zero._pre_step()
        self._zero._partition_all_parameters()
        self._zero._overflow_clean_up(1.0)

    def round_weights(self) -> None:
        self._zero._partition_all_parameters()  # weights that are still gathered would hide the new ones
        for number in range(len(self._flats)):
            swaps = self._zero._swappable_optimizer_subgroup(number)
            if swaps:
                self._zero._optimizer_states_and_gradient_swap_in(number)
            self._zero._reassign_or_swap_out_partitioned_parameters(number)
            if swaps:
                self._zero._release_swap_buffers(number)
        small = self._zero.persistent_parameters  # too small to be parted: whole on every rank, between steps as well
        if small:
            # The new values lie in the partitions: drop the whole copies, and gather them again.
            small[0].partition(small)
            small[0].all_gather(small)


def held_weight(parameter: Any, placement: Placement) -> Iterator[Master]:
    """A rank's part of a frozen parameter: an equal run of it in stage 3, else all of it."""
    if not hasattr(parameter, "ds_tensor"):
        yield Master(placement, (0, parameter.numel()), parameter.detach())
        return
    held = parameter.partition_numel()
    start = parameter.ds_process_group.rank() * held
    length = min(held, parameter.ds_numel - start)  # the last ranks' parts are padded
    if length > 0:
        yield Master(placement, (start, start + length), parameter.ds_tensor.detach().narrow(0, 0, length))
