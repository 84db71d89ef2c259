"""Whole optimizer steps on DeepSpeed, around our own modules."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llmtrain.config.parameters import declare_parameters
from llmtrain.config.schema import RunConfig
from llmtrain.engines.base import Scales
from llmtrain.engines.deepspeed_engine.setup import (
    build_deepspeed,
    expert_group,
    materialize_partitioned,
    prepare_deepspeed,
    register_experts,
)
from llmtrain.engines.deepspeed_engine.zero0 import Replicated, Sharding
from llmtrain.engines.deepspeed_engine.zero1_2 import Partitions
from llmtrain.engines.deepspeed_engine.zero3 import PartitionedWeights, held_weight
from llmtrain.engines.masters import (
    Master,
    Placement,
    fp32_master,
    gradients_of,
    sum_over_ranks,
)
from llmtrain.engines.routers import Routers, iter_moe
from llmtrain.engines.stage import Stage, staged_teacher
from llmtrain.engines.step import SteppingEngine
from llmtrain.engines.teacher import Teacher
from llmtrain.models.attention.multi_head import join_projections
from llmtrain.models.init import InitialWeights
from llmtrain.optim.table import parameter_groups
from llmtrain.parallel.cpu import stand_in_for_cuda
from llmtrain.parallel.groups import build_groups
from llmtrain.parallel.layout import plan_chunks
from llmtrain.parallel.stateless_random import Draws
from llmtrain.parallel.tensor import mark_parameter
from llmtrain.values.batch import Batch
from llmtrain.values.precision import DTYPES


class DeepSpeedEngine(SteppingEngine):
    """Tensor, sequence, context and data parallelism, ZeRO stages 0 to 3, optimizer state on the CPU or on NVMe.

    DeepSpeed partitions, reduces and gathers. Scales, norms, clipping and the decision about steps that are not finite
    are ours, by the same rules as in every engine: the gradients that it has accumulated and reduced, in fp32 in every
    stage and precision, are read and scaled where they lie before it steps.
    """

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        stand_in_for_cuda()  # before the groups: building them calls torch.cuda
        prepare_deepspeed(config, device)
        super().__init__(config, device)
        self.groups = build_groups(self.layout)
        self.declared = declare_parameters(config.model, config.finetune)
        self.placements: dict[nn.Parameter, Placement] = {}
        stage = self._build_stage()
        self.optimizer, self.engine, self.sharding = self._build_sharding(stage)
        self.routers = Routers(config, iter_moe(stage.model.stacks), device)
        self.averaged_over = self.sharding.averaged_over
        self.load_weights(InitialWeights(config.model, config.seed, config.finetune))
        if config.distill is not None:
            self.teacher = Teacher(
                config, staged_teacher(config, self.groups, self.chunk_tokens), device, self.chunk_tokens
            )
        if self.joins_projections:  # last: ZeRO has moved the weights into its buffers
            join_projections(stage, move=False)

    def _build_stage(self) -> Stage:
        (chunk,) = plan_chunks(self.layout, self.config.model.total_layers, None, 0)
        stage = Stage(self.config, self.groups, chunk, self.chunk_tokens)
        # The type first, on the meta device: the weights never take their fp32 room.
        stage.to(DTYPES[self.config.train.precision])
        if self.config.engine.zero_stage == 3:
            materialize_partitioned(stage, self.config, self.groups, self.device)
        else:
            stage.to_empty(device=self.device)
            if self.joins_projections:
                join_projections(stage, move=True)
        # From here on: a tensor that gets memory is a new parameter, without the marks of the old one.
        for parameter, placement in stage.part.named_placements():
            dim = self.declared[placement.name].split if self.layout.tensor > 1 else None
            mark_parameter(parameter, dim, self.layout.sequence, self._is_spread(placement.name))
            self.placements[parameter] = placement
        if self.layout.expert > 1:
            assert self.config.model.moe is not None, "config/rules/parallel.py: expert_divides_replicas"
            experts = [parameter for parameter, place in self.placements.items() if self._is_spread(place.name)]
            register_experts(stage, experts, self.config.model.moe.num_experts, self.groups)
        return stage

    def _is_spread(self, name: str) -> bool:
        """True where a parameter stacks experts, of which other ranks hold others."""
        return self.declared[name].expert and self.layout.expert > 1

    def _build_sharding(self, stage: Stage) -> tuple[torch.optim.Optimizer, Any, Sharding]:
        optim, zero_stage = self.config.optim, self.config.engine.zero_stage
        trained = {parameter: place for parameter, place in self.placements.items() if parameter.requires_grad}
        masters = {parameter: fp32_master(parameter) for parameter in trained} if zero_stage == 0 else {}
        # In stage 3 parameters have no shapes of their own any more: those of their places decide which decay.
        shapes = {
            torch.empty(place.box.shape, device="meta"): parameter
            for parameter, place in trained.items()
            if not self._is_spread(place.name)
        }
        groups = [
            {**group, "params": [masters.get(shapes[shape], shapes[shape]) for shape in group["params"]]}
            for group in parameter_groups({trained[each].name: shape for shape, each in shapes.items()}, optim)
        ]
        experts: dict[float, list[nn.Parameter]] = {}
        for parameter, place in trained.items():
            if self._is_spread(place.name):
                experts.setdefault(optim.scale_of(place.name), []).append(parameter)
        for scale in sorted(experts):
            group = {**expert_group(experts[scale], optim.weight_decay, self.groups), "lr_scale": scale}
            groups.append({**group, "params": [masters.get(parameter, parameter) for parameter in group["params"]]})
        optimizer = self.row.build(groups, optim)
        engine = build_deepspeed(self.config, stage, optimizer, self.groups, self.device)
        if zero_stage == 0:
            # The ranks that hold the same part of each parameter.
            groups_of_masters = {
                parameter: self.groups.expert_data if self._is_spread(place.name) else self.groups.data_context
                for parameter, place in self.placements.items()
            }
            return optimizer, engine, Replicated(engine, self.row, self.placements, masters, groups_of_masters)
        sharding = PartitionedWeights if zero_stage == 3 else Partitions
        return optimizer, engine, sharding(engine, self.row, self.placements)

    @property
    def data_group(self) -> dist.ProcessGroup:
        return self.groups.data

    @property
    def optimizers(self) -> Sequence[torch.optim.Optimizer]:
        return (self.optimizer,)

    def resident(self, write: bool = False) -> Iterator[list[Master]]:
        return self.sharding.resident(write)

    def frozen(self) -> Iterator[Master]:
        for parameter, placement in self.placements.items():
            if not parameter.requires_grad:
                yield from held_weight(parameter, placement)

    def run(self, micro_batches: Sequence[Batch], step: int | None, scales: Scales) -> Tensor:
        self.engine.train(step is not None)
        loss_sum = self.zero_sums(micro_batches, step)
        for number, batch in enumerate(micro_batches):
            global_number = self.place.data + number * self.layout.data
            draws = None if step is None else Draws.of_micro_batch(self.config.seed, step, global_number, self.device)
            if step is not None:
                # DeepSpeed expects one micro-batch per step; by this it knows the last backward pass, and reduces.
                self.engine.set_gradient_accumulation_boundary(number == len(micro_batches) - 1)
            objective, batch_loss_sum, reports = self.engine(batch.to(self.device), draws, scales)
            if step is not None:
                self.engine.backward(objective, scale_wrt_gas=False)  # the objective is divided for the step already
                self.routers.add(reports)
            loss_sum += batch_loss_sum
        return loss_sum

    @torch.no_grad()
    def reduce(self) -> None:
        self.sharding.reduce()
        if self.layout.tensor > 1:
            # Tensor ranks use some whole parameters on their own heads, or their own part of the sequence, only. Their
            # gradients are parts, summed here: nobody under DeepSpeed calls megatron-core's reductions.
            for masters in self.resident(write=True):
                declared = [self.declared[master.placement.name] for master in masters]
                partial = [
                    master
                    for master, each in zip(masters, declared, strict=True)
                    if each.partial or (self.layout.sequence and each.split is None)
                ]
                if partial:
                    sum_over_ranks(gradients_of(partial), self.groups.tensor)

    def update(self) -> None:
        self.sharding.update()

    def drop(self) -> None:
        self.sharding.drop()

    def round_weights(self) -> None:
        self.sharding.round_weights()
