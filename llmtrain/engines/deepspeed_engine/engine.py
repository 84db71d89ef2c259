"""Whole optimizer steps on DeepSpeed, around our own modules."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llmtrain.config.schema import RunConfig
from llmtrain.engines.base import EvalResult, StepResult
from llmtrain.engines.deepspeed_engine.experts import expert_group, register_experts
from llmtrain.engines.deepspeed_engine.masters import MOMENTS, Master, Replicated, Sharding, fp32_masters
from llmtrain.engines.deepspeed_engine.partitions import Partitions
from llmtrain.engines.deepspeed_engine.setup import build_deepspeed, materialize_partitioned, prepare_deepspeed
from llmtrain.engines.deepspeed_engine.weights import PartitionedWeights
from llmtrain.engines.inputs import Scales
from llmtrain.engines.placement import InitialWeights, Placement, iter_range_boxes, read_range
from llmtrain.engines.precision import DTYPES, clip_factor, scale_gradients
from llmtrain.engines.routers import Routers, iter_moe
from llmtrain.engines.stage import Stage
from llmtrain.models.sharding import PARTIAL, is_expert, split_dim
from llmtrain.optim.groups import parameter_groups
from llmtrain.optim.scaler import build_loss_scale
from llmtrain.parallel.all_reduce import sum_over_ranks
from llmtrain.parallel.cpu import stand_in_for_cuda
from llmtrain.parallel.groups import build_groups
from llmtrain.parallel.layout import plan_chunks, plan_layout
from llmtrain.parallel.parameter_attributes import mark_parameter
from llmtrain.parallel.stateless_random import Draws
from llmtrain.values.batch import Batch
from llmtrain.values.fragment import Fragment, FragmentSource


class DeepSpeedEngine:
    """Tensor, sequence, context and data parallelism, ZeRO stages 0 to 3, optimizer state on the CPU or on NVMe.

    DeepSpeed partitions, reduces and gathers. Scales, norms, clipping and the decision about steps that are not finite
    are ours, by the same rules as in every engine: the gradients that it has accumulated and reduced, in fp32 in every
    stage and precision, are read and scaled where they lie before it steps.
    """

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        stand_in_for_cuda()
        prepare_deepspeed(config, device)
        self.config = config
        self.device = device
        self.layout = plan_layout(config.parallel, dist.get_world_size())
        self.groups = build_groups(self.layout)
        self.placements: dict[nn.Parameter, Placement] = {}
        stage = self._build_stage()
        self.optimizer, self.engine, self.sharding = self._build_sharding(stage)
        self.routers = Routers(config.model, iter_moe(stage.stacks), device)
        self.loss_scale = build_loss_scale(config.train.precision, config.optim)
        self.inspect_gradients: Callable[[Iterable[Fragment]], None] | None = None
        """Called with this rank's part of the gradients, unscaled and not clipped, before each update."""
        self.load_weights(InitialWeights(config.model, config.seed, stage.global_shapes.__getitem__))

    def _build_stage(self) -> Stage:
        (chunk,) = plan_chunks(self.layout, self.config.model.total_layers, None, 0)
        stage = Stage(self.config, self.groups, chunk)
        stage.to(DTYPES[self.config.train.precision])
        if self.config.engine.zero_stage == 3:
            materialize_partitioned(stage, self.config, self.groups, self.device)
        else:
            stage.to_empty(device=self.device)
        for parameter, placement in stage.named_placements():
            name = placement.name
            dim = split_dim(name) if self.layout.tensor > 1 else None
            mark_parameter(parameter, dim, self.layout.sequence, self._is_spread(name))
            self.placements[parameter] = placement
        if self.layout.expert > 1:
            assert self.config.model.moe is not None, "a rule says so"
            register_experts(stage, self.config.model.moe.num_experts, self.groups)
        return stage

    def _is_spread(self, name: str) -> bool:
        """Whether a parameter stacks experts of which other ranks hold others."""
        return is_expert(name) and self.layout.expert > 1

    def _build_sharding(self, stage: Stage) -> tuple[torch.optim.Optimizer, Any, Sharding]:
        optim, zero_stage = self.config.optim, self.config.engine.zero_stage
        masters = fp32_masters(self.placements) if zero_stage == 0 else {}
        # In stage 3 parameters have no shapes of their own any more: those of their places decide which decay.
        shapes = {
            torch.empty(place.box.shape, device="meta"): parameter
            for parameter, place in self.placements.items()
            if not self._is_spread(place.name)
        }
        groups = [
            {**group, "params": [masters.get(shapes[shape], shapes[shape]) for shape in group["params"]]}
            for group in parameter_groups(shapes, optim.weight_decay)
        ]
        experts = [parameter for parameter, place in self.placements.items() if self._is_spread(place.name)]
        if experts:
            group = expert_group(experts, optim.weight_decay, self.groups)
            groups.append({**group, "params": [masters.get(parameter, parameter) for parameter in group["params"]]})
        optimizer = torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)
        engine = build_deepspeed(self.config, stage, optimizer, self.groups, self.device)
        if zero_stage == 0:
            return optimizer, engine, Replicated(engine, masters, self._groups_of_masters())
        return optimizer, engine, PartitionedWeights(engine) if zero_stage == 3 else Partitions(engine)

    def _groups_of_masters(self) -> dict[nn.Parameter, dist.ProcessGroup]:
        """The ranks that hold the same part of each parameter."""
        names = {parameter: place.name for parameter, place in self.placements.items()}
        groups = {True: self.groups.expert_data, False: self.groups.data_context}
        return {parameter: groups[self._is_spread(name)] for parameter, name in names.items()}

    def train_step(self, step: int, micro_batches: Sequence[Batch], lr: float) -> StepResult:
        self.engine.train()
        num_tokens = self._sum_over_data(sum(batch.num_valid_tokens for batch in micro_batches))
        loss_scale = self.loss_scale.scale if self.loss_scale else 1.0
        num_micro_batches = len(micro_batches) * self.layout.data
        scales = Scales(loss_scale / max(1, num_tokens), loss_scale / num_micro_batches)
        self.routers.forget()
        loss_sum = torch.zeros((), device=self.device)
        for number, batch in enumerate(micro_batches):
            self.engine.set_gradient_accumulation_boundary(number == len(micro_batches) - 1)
            global_number = self.groups.place.data + number * self.layout.data
            draws = Draws.of_micro_batch(self.config.seed, step, global_number, self.device)
            objective, batch_loss_sum, reports = self.engine(batch.to(self.device), draws, scales)
            self.engine.backward(objective, scale_wrt_gas=False)
            self.routers.add(reports)
            loss_sum += batch_loss_sum
        self.sharding.reduce()
        unscale = self.sharding.averaged_over / loss_scale
        loss, grad_norm = self._loss_and_norm(loss_sum / max(1, num_tokens), unscale)
        if self.inspect_gradients:
            self.inspect_gradients(self._gradient_fragments(unscale))
        finite = math.isfinite(grad_norm) and math.isfinite(loss)
        metrics = self.routers.step_metrics(num_micro_batches, self._total)
        if finite:
            self._update(grad_norm, unscale, lr)
            self.routers.rebalance()
        else:
            self.sharding.drop()
        if self.loss_scale:
            metrics["loss_scale"] = loss_scale
            self.loss_scale.update(finite)
        return StepResult(loss, grad_norm, num_tokens, skipped=not finite, metrics=metrics)

    @torch.no_grad()
    def eval_step(self, micro_batches: Sequence[Batch]) -> EvalResult:
        self.engine.eval()
        losses = [self.engine(batch.to(self.device), None, Scales(1.0))[1] for batch in micro_batches]
        total = torch.stack(losses).sum().double()
        dist.all_reduce(total)
        num_tokens = self._sum_over_data(sum(batch.num_valid_tokens for batch in micro_batches))
        return EvalResult(float(total) / self.layout.tensor, num_tokens)

    def _sum_over_data(self, count: int) -> int:
        total = torch.tensor(count, device=self.device)
        dist.all_reduce(total, group=self.groups.data)
        return int(total)

    def _total(self, sums: Tensor) -> Tensor:
        """Sums over all ranks; tensor ranks that hold the same tokens have counted each of them."""
        dist.all_reduce(sums)
        return sums if self.layout.sequence else sums / self.layout.tensor

    def _is_partial(self, master: Master) -> bool:
        """Whether tensor ranks have parts of a gradient that all of them need the sum of."""
        used_in_part = self.placements[master.parameter].name.endswith(PARTIAL) and self.layout.tensor > 1
        return used_in_part or getattr(master.parameter, "sequence_parallel", False)

    @torch.no_grad()
    def _loss_and_norm(self, loss: Tensor, unscale: float) -> tuple[float, float]:
        """The loss of the whole step and the norm of its gradient, from the parts of all ranks."""
        squares = torch.zeros((), dtype=torch.float64, device=self.device)
        for masters in self.sharding.resident(write=self.layout.tensor > 1):
            partial = [master for master in masters if self._is_partial(master)]
            if partial:
                sum_over_ranks([m.grad for m in partial if m.grad is not None], self.groups.tensor)
            grads = [master.grad for master in masters if master.grad is not None and self._owns(master)]
            squares += torch.nn.utils.get_total_norm(grads).double().square().to(self.device)
        # Every tensor rank has the whole loss of its part of the batch.
        totals = torch.stack((loss.double() / self.layout.tensor, squares))
        dist.all_reduce(totals)
        loss_total, squares_total = totals.tolist()  # the host waits here
        return loss_total, math.sqrt(squares_total) * unscale

    @torch.no_grad()
    def _update(self, grad_norm: float, unscale: float, lr: float) -> None:
        factor = clip_factor(self.config.optim.grad_clip, grad_norm) * unscale
        if factor != 1.0:
            for masters in self.sharding.resident(write=True):
                scale_gradients([master.grad for master in masters if master.grad is not None], factor)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.sharding.update()

    def _owns(self, master: Master) -> bool:
        """Whether this rank, of all that hold these elements, is the one that counts and saves them."""
        placement = self.placements[master.parameter]
        return placement.owned and (self.sharding.sharded or placement.replica == 0)

    def _fragments_of(self, master: Master, kind: str, data: Tensor) -> Iterator[Fragment]:
        placement = self.placements[master.parameter]
        for box, offset in iter_range_boxes(placement.box, *master.span):
            part = data[offset : offset + box.num_elements].view(box.shape)
            yield Fragment(placement.name, kind, placement.global_shape, box, part)

    def _gradient_fragments(self, factor: float) -> Iterator[Fragment]:
        for masters in self.sharding.resident():
            for master in filter(self._owns, masters):
                if master.grad is not None:
                    yield from self._fragments_of(master, "gradient", master.grad * factor)

    def fragments(self) -> Iterator[Fragment]:
        swapped = self.config.engine.offload == "nvme"  # what is read from there stays in memory as long as its group
        for masters in self.sharding.resident():
            for master in filter(self._owns, masters):
                for kind, data in {"master": master.tensor, **master.moments}.items():
                    yield from self._fragments_of(master, kind, data.clone() if swapped else data)
        if dist.get_rank() == 0:
            yield from self.routers.fragments()

    def load(self, source: FragmentSource) -> None:
        self.routers.load(source)
        self._read(source, ("master", *MOMENTS))

    def load_weights(self, source: FragmentSource) -> None:
        self._read(source, ("master",))

    @torch.no_grad()
    def _read(self, source: FragmentSource, kinds: Sequence[str]) -> None:
        for masters in self.sharding.resident(write=True):
            for master in masters:
                targets = {"master": master.tensor, **master.moments}
                for kind in kinds:
                    read_range(source, self.placements[master.parameter], kind, master.span, targets[kind])
        self.sharding.round_weights()

    def state(self) -> dict[str, Any]:
        steps = int(next(self.sharding.counts()))
        return {"adam_steps": steps, "loss_scale": self.loss_scale.state() if self.loss_scale else None}

    def load_state(self, state: Mapping[str, Any]) -> None:
        for count in self.sharding.counts():
            count.fill_(state["adam_steps"])
        if self.loss_scale and state["loss_scale"]:
            self.loss_scale.load_state(state["loss_scale"])
