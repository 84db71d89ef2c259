"""Plain PyTorch, one device per rank: the readable reference that every other engine is compared with.

Several ranks share the batch and nothing else: each holds the whole model, and gradients are summed over them.
"""

from collections.abc import Iterator, Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from llmtrain.config.parameters import declare_parameters
from llmtrain.config.schema import RunConfig
from llmtrain.engines.base import Scales
from llmtrain.engines.masters import (
    Master,
    Placement,
    fp32_master,
    freeze,
    gradients_of,
    make_state,
    moments_of,
    sum_over_ranks,
)
from llmtrain.engines.overlapped_sum import OverlappedSum
from llmtrain.engines.routers import Routers, iter_moe
from llmtrain.engines.step import SteppingEngine
from llmtrain.engines.teacher import Teacher, whole_teacher
from llmtrain.finetune.additions import add_trained_parts
from llmtrain.models.attention.multi_head import join_projections
from llmtrain.models.compiled_graphs import compile_layers
from llmtrain.models.float8 import multiply_in_float8
from llmtrain.models.head import Objective
from llmtrain.models.init import InitialWeights
from llmtrain.models.rounded_products import Rounding, round_products
from llmtrain.models.stack import Pass
from llmtrain.models.transformer import build_model, chosen_from
from llmtrain.optim.table import parameter_groups
from llmtrain.parallel.stateless_random import Draws
from llmtrain.values.batch import Batch
from llmtrain.values.fragment import Box
from llmtrain.values.precision import DTYPES


class TorchEngine(SteppingEngine):
    """Weights in the training precision, and fp32 masters, gradients and moments beside them.

    In fp32 the weights are their own masters. In lower precisions each gradient is added to its master's fp32
    gradient as soon as it is complete, and freed.
    """

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        super().__init__(config, device)
        self.model = build_model(config.model, config.train.recompute)
        packings, declared = {}, declare_parameters(config.model, config.finetune)
        if config.quantize is not None:
            rounding = Rounding(config.quantize, DTYPES[config.train.precision], config.frozen)
            packings = round_products(self.model, rounding)
        add_trained_parts(self.model, config.finetune, declared)
        if config.train.precision == "fp8":
            multiply_in_float8(self.model)
        # The type first, on the meta device: the weights never take their fp32 room.
        self.model.to(DTYPES[config.train.precision]).to_empty(device=device)
        if self.joins_projections:
            join_projections(self.model, move=True)
        self.parameters = dict(self.model.named_parameters())
        freeze(self.parameters, config.frozen)
        trained = {name: parameter for name, parameter in self.parameters.items() if parameter.requires_grad}
        self.masters = {name: fp32_master(parameter) for name, parameter in trained.items()}
        self.placements = {
            name: Placement(
                name,
                declared[name].shape,
                Box.whole(declared[name].shape),
                replica=self.rank,
                packing=packings.get(name),
            )
            for name in self.parameters
        }
        groups = parameter_groups(self.masters, config.optim)
        self.optimizer = self.row.build(groups, config.optim)
        make_state(self.optimizer, self.row, self.masters.values())
        # Made once: a step asks for them twice, and all but the gradients stays the same.
        self._resident = [
            Master(
                self.placements[name],
                (0, master.numel()),
                master.detach(),
                moments_of(self.optimizer, self.row, master),
                owned=self.rank == 0,  # every rank holds the same
            )
            for name, master in self.masters.items()
        ]
        self.summing = None
        if self.overlaps and self.data_group is not None:
            self.summing = OverlappedSum(self.masters.values(), self.data_group)
            for name, parameter in trained.items():
                report = partial(report_gradient, self.summing, self.masters[name])
                # After the hook of `fp32_master`, which completes the master's gradient.
                parameter.register_post_accumulate_grad_hook(report)
        self.routers = Routers(config, iter_moe(self.model.stacks), device)
        self.load_weights(InitialWeights(config.model, config.seed, config.finetune))
        if config.distill is not None:
            self.teacher = Teacher(config, whole_teacher(config), device, self.chunk_tokens)
        if self.compiles:
            compile_layers(layer for stack in self.model.stacks for layer in stack.layers.values())

    @property
    def data_group(self) -> dist.ProcessGroup | None:
        return dist.group.WORLD if dist.is_initialized() else None

    @property
    def optimizers(self) -> Sequence[torch.optim.Optimizer]:
        return (self.optimizer,)

    def resident(self, write: bool = False) -> Iterator[list[Master]]:
        for master, weight in zip(self._resident, self.masters.values(), strict=True):
            master.grad = weight.grad
        yield self._resident

    def frozen(self) -> Iterator[Master]:
        for name in self.parameters.keys() - self.masters.keys():
            weight = self.parameters[name].detach()
            yield Master(self.placements[name], (0, weight.numel()), weight)

    def run(self, micro_batches: Sequence[Batch], step: int | None, scales: Scales) -> Tensor:
        if self.model.training != (step is not None):  # setting the mode visits every module
            self.model.train(step is not None)
        whole = chosen_from(self.config.model)
        loss_sum = self.zero_sums(micro_batches, step)  # read once per step, by `_totals`
        for number, batch in enumerate(micro_batches):
            global_number = self.place.data + number * self.layout.data
            draws = None if step is None else Draws.of_micro_batch(self.config.seed, step, global_number, self.device)
            batch = batch.to(self.device)
            hidden_SBH, reports = self.model(batch, Pass(draws, scales.balance))
            head = Objective(scales.loss, self.chunk_tokens, whole, draws)
            objective, batch_loss_sum = self.model.loss(hidden_SBH, batch.labels_BS, head, batch)
            if step is not None:
                if self.summing and number == len(micro_batches) - 1:
                    self.summing.begin()
                objective.backward()
                self.routers.add(reports)
            loss_sum += batch_loss_sum
        return loss_sum

    def reduce(self) -> None:
        if self.summing is not None:
            self.summing.finish()
        elif self.data_group is not None:
            # Once per step, after the last micro-batch: gradients of a step travel once, as fp32 sums.
            sum_over_ranks(gradients_of(next(self.resident())), self.data_group)

    def update(self) -> None:
        self.optimizer.step()
        self.drop()
        self.round_weights()

    def drop(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        for master in self._resident:
            master.grad = None  # or its memory would stay

    @torch.no_grad()
    def round_weights(self) -> None:
        """Low-precision weights are the masters, rounded; in fp32 they are the masters."""
        if self.config.train.precision != "fp32":
            weights: list[Tensor] = [self.parameters[name] for name in self.masters]
            # All tensors in few kernels; torch has no public name for it.
            torch._foreach_copy_(weights, [*self.masters.values()])  # pyright: ignore[reportPrivateImportUsage]


def report_gradient(summing: OverlappedSum, master: Tensor, parameter: Tensor) -> None:
    """A hook on the parameter that a master belongs to, called when a backward pass is through with it."""
    summing.ready(master)
