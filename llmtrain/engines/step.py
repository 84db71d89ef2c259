"""One optimizer step, evaluation, saving and loading: written once, in terms of masters.

An engine says how to run, reduce, step and gather. What follows from that is the same in all of them, so that they
compute the same numbers: the count of tokens, scales, norm, clipping, and whether a step changes anything.
"""

import gc
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from llmtrain.checkpoint.origin import updates_of
from llmtrain.config.engines import ENGINES
from llmtrain.config.schema import RunConfig
from llmtrain.engines.base import GradientInspector, Scales
from llmtrain.engines.masters import (
    Master,
    gradients_of,
    read_masters,
    require_moments,
    set_updates,
)
from llmtrain.engines.pruning import Pruning
from llmtrain.engines.routers import Routers
from llmtrain.engines.teacher import Teacher
from llmtrain.optim.schedule import LossScale
from llmtrain.optim.table import row_of
from llmtrain.parallel.layout import plan_layout
from llmtrain.values.batch import Batch
from llmtrain.values.fragment import Fragment, FragmentSource
from llmtrain.values.label_metrics import num_counts
from llmtrain.values.progress import DISTILL_LOSS, EvalResult, StepResult

COLLECT_EVERY_STEPS = 50
"""A run's ranks turn Python's garbage collector off and collect here, all at the same step: at other times each of them
would wait for the one whose collector is running."""


class SteppingEngine(ABC):
    """The common part of all engines. A subclass builds its model and optimizer, sets `routers`, and loads weights."""

    routers: Routers

    teacher: Teacher | None = None
    """Of a distillation."""

    averaged_over = 1
    """The number that gradients, once reduced, have been divided by."""

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        self.config = config
        self.device = device
        self.row = row_of(config.optim)
        self.layout = plan_layout(config.parallel, dist.get_world_size() if dist.is_initialized() else 1)
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.place = self.layout.coordinates(self.rank)
        # Gradients underflow in fp16 alone.
        self.loss_scale = LossScale(config.optim.loss_scale) if config.train.precision == "fp16" else None
        on_gpu = device.type == "cuda"
        asked, able = config.train.compile, ENGINES[config.engine.name].compiles(config.parallel.tensor)
        self.compiles = (on_gpu and able) if asked is None else asked
        overlap = config.parallel.overlap_grad_reduce
        self.overlaps = on_gpu if overlap is None else overlap
        # One pass over the gradients fewer, and other last bits: on a CPU numbers stay what they were.
        self.clips_in_update = on_gpu and self.row.divides
        # As above. ZeRO 3 has no weights in memory before they are needed.
        self.joins_projections = on_gpu and config.engine.zero_stage < 3
        rows = config.model.head_rows // (1 if config.model.predicts_labels else self.layout.tensor)
        self.chunk_tokens = config.train.chunk_tokens(rows, on_gpu)
        self.num_updates = 0
        self.pruning = Pruning(config, self.resident, device) if config.prune else None
        self.inspect_gradients: GradientInspector | None = None

    @property
    @abstractmethod
    def data_group(self) -> dist.ProcessGroup | None:
        """The ranks that share the batch; None where one rank has all of it."""

    @property
    @abstractmethod
    def optimizers(self) -> Sequence[torch.optim.Optimizer]:
        """The optimizers that step the masters of this rank."""

    @abstractmethod
    def resident(self, write: bool = False) -> Iterator[list[Master]]:
        """All masters of this rank, in lists of those that are in memory together, until the next list is asked for.

        The order is the same every time, and on every tensor rank. What is changed is kept only where `write` says so.
        """

    @abstractmethod
    def frozen(self) -> Iterator[Master]:
        """This rank's part of the parameters that are not trained: weights in the training precision, no more."""

    @abstractmethod
    def run(self, micro_batches: Sequence[Batch], step: int | None, scales: Scales) -> Tensor:
        """Forward, and backward where there is a step. Returns the sum of the loss over the targets of this rank.

        Every tensor rank has the whole loss of its part of the batch; of a pipeline, the last stage has it. Behind it
        stand the divergence from a teacher, or without a step the counts of a head for labels, or the sums of each text
        where batches tell them apart.
        """

    @abstractmethod
    def reduce(self) -> None:
        """Complete the gradients: summed over all ranks that hold the same elements, where `run` has not done it."""

    @abstractmethod
    def update(self) -> None:
        """Step the optimizers with the gradients as they are, forget those, round the weights and gather them."""

    @abstractmethod
    def drop(self) -> None:
        """Forget the gradients of a step that is skipped."""

    @abstractmethod
    def round_weights(self) -> None:
        """Copy the masters to the weights that the model computes with, on all ranks."""

    def train_step(self, step: int, micro_batches: Sequence[Batch], lr: float) -> StepResult:
        # The count of the whole step is known before the first backward: gradients are sums, divided once.
        num_tokens = self.sum_over_data(sum(batch.num_valid_tokens for batch in micro_batches))
        loss_scale = self.loss_scale.scale if self.loss_scale else 1.0
        num_micro_batches = len(micro_batches) * self.layout.data
        self.routers.forget()
        scales = Scales(loss_scale / max(1, num_tokens), loss_scale / num_micro_batches)
        loss_sum = self.run(self._taught(micro_batches), step, scales)
        self.reduce()
        if self.pruning:
            self.pruning.keep_zeros(step)
        unscale = self.averaged_over / loss_scale
        (loss, *taught), grad_norm, routed = self._totals(loss_sum / max(1, num_tokens), unscale)
        if self.inspect_gradients:  # before the update, which scales them in place
            self.inspect_gradients(self._gradient_fragments(unscale))
        # Both are sums over all ranks, so every rank decides alike without another word.
        finite = math.isfinite(grad_norm) and math.isfinite(loss)
        metrics = self.routers.step_metrics(routed, num_micro_batches)
        if taught:
            metrics[DISTILL_LOSS] = taught[0]
        if finite:
            clip = self.config.optim.grad_clip
            self._update((min(1.0, clip / (grad_norm + 1e-6)) if clip else 1.0) * unscale, lr)
            self.routers.rebalance()
        else:
            self.drop()
        if self.pruning:
            if self.pruning.prune(step):
                self.round_weights()
            metrics.update(self.pruning.metrics(step))
        if self.loss_scale:
            metrics["loss_scale"] = loss_scale
            self.loss_scale.update(finite)
        if step % COLLECT_EVERY_STEPS == 0:
            gc.collect(1)  # the young: what was there before the run is not looked through again
        return StepResult(loss, grad_norm, num_tokens, skipped=not finite, metrics=metrics)

    @torch.no_grad()
    def eval_step(self, micro_batches: Sequence[Batch]) -> EvalResult:
        # Each tensor rank has the whole loss of its part: the sum over the world counts it as often as there are some.
        sums = self.run(self._taught(micro_batches), None, Scales(1.0)).double() / self.layout.tensor
        if dist.is_initialized():
            dist.all_reduce(sums)
        num_tokens = self.sum_over_data(sum(batch.num_valid_tokens for batch in micro_batches))
        loss_sum, *counts = sums.flatten().tolist()  # the host waits here
        return EvalResult(loss_sum, num_tokens, tuple(counts))

    def _taught(self, micro_batches: Sequence[Batch]) -> Sequence[Batch]:
        """The micro-batches with what a teacher predicts; texts that tasks ask about are no lessons."""
        if self.teacher is None or micro_batches[0].num_texts:
            return micro_batches
        return self.teacher.teach(micro_batches)

    def zero_sums(self, micro_batches: Sequence[Batch], step: int | None) -> Tensor:
        """What `run` adds to: the loss, [], with a teacher [2], and in an evaluation what stands behind it, [1 + K]."""
        if micro_batches[0].num_texts:
            return torch.zeros(1 + 2 * micro_batches[0].num_texts, dtype=torch.float64, device=self.device)
        counts = num_counts(self.config.model) if step is None else 0
        counts = 1 if self.config.distill is not None else counts
        return torch.zeros(1 + counts if counts else (), device=self.device)

    def sum_over_data(self, count: int) -> int:
        """A count of the host over the ranks that share the batch; on the host, so that no device is waited for."""
        if self.data_group is None:
            return count
        total = torch.tensor(count)  # on the CPU: the groups have a backend for either device
        dist.all_reduce(total, group=self.data_group)
        return int(total)

    @torch.no_grad()
    def _totals(self, losses: Tensor, unscale: float) -> tuple[list[float], float, Tensor]:
        """The losses of the step, the norm of its gradient, and the routers' sums, from the parts of all ranks."""
        norms = [
            torch.nn.utils.get_total_norm(gradients_of(master for master in masters if master.owned))
            for masters in self.resident()
        ]
        squares = sum(norm.double().square().to(self.device) for norm in norms)
        assert isinstance(squares, Tensor), "every rank has masters, or an empty list of them"
        # All in one collective. Tensor ranks have the same losses, and each its own part of the norm.
        totals = torch.cat((losses.double().flatten() / self.layout.tensor, squares[None]))
        routed = len(totals)  # where what the routers have counted begins
        sums = self.routers.sums
        if sums.numel():
            totals = torch.cat((totals, sums.flatten()))
        if dist.is_initialized():
            dist.all_reduce(totals)
        if sums.numel():
            if not self.layout.sequence:
                totals[routed:] /= self.layout.tensor  # each tensor rank has counted every token
            sums.copy_(totals[routed:].view_as(sums))
        host = totals.cpu()  # the host waits here, for all that the device has to do
        *loss_totals, squares_total = host[:routed].tolist()
        return loss_totals, math.sqrt(squares_total) * unscale, host[routed:].view_as(sums)

    @torch.no_grad()
    def _update(self, factor: float, lr: float) -> None:
        clips_in_update = self.clips_in_update and factor != 1.0
        # Filled on the device: a copy from the host would be waited for.
        divisor = torch.full((), 1 / factor, device=self.device) if clips_in_update else None
        if factor != 1.0 and not clips_in_update:
            for masters in self.resident(write=True):
                grads = gradients_of(masters)
                if grads:  # torch refuses an empty list, and has no public name for many products at once
                    torch._foreach_mul_(grads, factor)  # pyright: ignore[reportPrivateImportUsage]
        for optimizer in self.optimizers:
            optimizer.grad_scale = divisor  # pyright: ignore[reportAttributeAccessIssue]  # read by torch's fused AdamW
            for group in optimizer.param_groups:
                group["lr"] = lr * group.get("lr_scale", 1.0)
        self.update()
        self.num_updates += 1

    def _gradient_fragments(self, factor: float) -> Iterator[Fragment]:
        for masters in self.resident():
            for master in masters:
                if master.owned and master.grad is not None:
                    yield from master.fragments("gradient", master.grad * factor)

    def fragments(self) -> Iterator[Fragment]:
        swapped = self.config.engine.offload == "nvme"  # what is read from there stays in memory as long as its list
        for masters in self.resident():
            for master in masters:
                for kind, data in master.tensors().items() if master.owned else ():
                    yield from master.fragments(kind, data.clone() if swapped else data)
        if self.rank == 0:
            yield from self.routers.fragments()

    def load(self, source: FragmentSource) -> None:
        self._read(source, ("master", *self.row.moments))

    def load_weights(self, source: FragmentSource) -> None:
        self._read(source, ("master",))

    @torch.no_grad()
    def _read(self, source: FragmentSource, kinds: Sequence[str]) -> None:
        self.routers.load(source)
        for masters in self.resident(write=True):
            if len(kinds) > 1:
                require_moments(source, masters, self.config.optim.name)
            read_masters(source, masters, kinds)
        read_masters(source, self.frozen(), ("master",))
        self.round_weights()  # last: the model computes with rounded masters, and other ranks fetch them

    def state(self) -> dict[str, Any]:
        return {"updates": self.num_updates, "loss_scale": self.loss_scale.state() if self.loss_scale else None}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.num_updates = updates_of(state)
        for optimizer in self.optimizers:
            set_updates(optimizer, self.num_updates)
        if self.loss_scale and state["loss_scale"]:
            self.loss_scale.load_state(state["loss_scale"])
