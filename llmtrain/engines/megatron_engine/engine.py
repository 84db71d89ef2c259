"""Whole optimizer steps on megatron-core's schedules, around our own modules."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any, cast

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from llmtrain.config.model import ModelConfig
from llmtrain.config.parameter_shapes import parameter_shapes
from llmtrain.config.schema import RunConfig
from llmtrain.config.sequence_lengths import sample_lengths
from llmtrain.engines.base import EvalResult, GradientInspector, StepResult
from llmtrain.engines.inputs import Scales
from llmtrain.engines.megatron_engine.chunk import PipelineChunk, transformer_config
from llmtrain.engines.megatron_engine.masters import Master, iter_masters, round_weights
from llmtrain.engines.placement import InitialWeights, Placement, iter_range_boxes, read_range
from llmtrain.engines.precision import DTYPES, clip_factor, scale_gradients
from llmtrain.engines.routers import Routers, iter_moe
from llmtrain.engines.stage import Stage
from llmtrain.models.sharding import ON_SEVERAL_STAGES, PARTIAL, is_expert, split_dim
from llmtrain.optim.scaler import build_loss_scale
from llmtrain.parallel.all_reduce import sum_over_ranks
from llmtrain.parallel.cpu import call_cuda_tensors, stand_in_for_cuda
from llmtrain.parallel.groups import build_groups
from llmtrain.parallel.layout import plan_chunks, plan_layout
from llmtrain.parallel.parameter_attributes import mark_parameter
from llmtrain.parallel.stateless_random import Draws
from llmtrain.values.batch import Batch
from llmtrain.values.fragment import Fragment, FragmentSource

MicroBatch = tuple[int, Batch]
"""A micro-batch with its number in the step, over all ranks."""


class MegatronEngine:
    """Tensor, sequence, pipeline, context and data parallelism, ZeRO stages 0 and 1.

    megatron-core reduces gradients and steps the optimizer. What it would decide about scales, norms and steps that are
    not finite is decided here, by the same rules as in every engine.
    """

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        stand_in_for_cuda()
        self.config = config
        self.device = device
        self.layout = plan_layout(config.parallel, dist.get_world_size())
        self.groups = build_groups(self.layout)
        self.dtype = DTYPES[config.train.precision]
        self.megatron_config = transformer_config(config, self.layout, self.dtype)
        self.megatron_config.finalize_model_grads_func = self._finalize
        self.lengths = sample_lengths(config.model.family, config.data)
        self.placements: dict[torch.nn.Parameter, Placement] = {}
        self.chunks = [
            self._build_chunk(number, chunk)
            for number, chunk in enumerate(
                plan_chunks(
                    self.layout, config.model.total_layers, config.parallel.pipeline_split, self.groups.place.pipeline
                )
            )
        ]
        self.optimizers = self._build_optimizers()
        self.masters = [master for optimizer in self.optimizers for master in iter_masters(optimizer)]
        self.loss_scale = build_loss_scale(config.train.precision, config.optim)
        self.inspect_gradients: GradientInspector | None = None
        stages = [cast(PipelineChunk, chunk.module).stage for chunk in self.chunks]
        self.routers = Routers(config.model, iter_moe(chain(*(stage.stacks for stage in stages))), device)
        self.load_weights(InitialWeights(config.model, config.seed, stages[0].global_shapes.__getitem__))

    def _build_chunk(self, number: int, chunk: Any) -> DistributedDataParallel:
        stage = Stage(self.config, self.groups, chunk)
        stage.to_empty(device=self.device)
        stage.to(self.dtype)
        tied = self.config.model.tie_embeddings
        module = PipelineChunk(stage, self.megatron_config, tied, number)
        for parameter, placement in stage.named_placements():
            name = placement.name
            dim = split_dim(name) if self.layout.tensor > 1 else None
            mark_parameter(parameter, dim, self.layout.sequence, is_expert(name) and self.layout.expert > 1)
            if name in ON_SEVERAL_STAGES and self.layout.num_chunks > 1:
                # Gradients of parts of it are summed over stages: parts must be the same on all of them.
                parameter.shared_embedding = True  # type: ignore[attr-defined]  # read by megatron-core under this name
                parameter.shared = first_layer(name, self.config.model) not in chunk.layers  # type: ignore[attr-defined]
            self.placements[parameter] = placement
        word = module.shared_embedding_or_output_weight()
        if tied and self.layout.pipeline > 1 and word is not None:
            word.shared_embedding = True  # type: ignore[attr-defined]  # read by megatron-core under this name
            if not chunk.first:
                # The first stage's copy counts in the norm and is saved.
                word.shared = True  # type: ignore[attr-defined]
        call_cuda_tensors(stage.parameters())
        ddp = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=self.config.parallel.overlap_grad_reduce,
            use_distributed_optimizer=self.config.engine.zero_stage == 1,
        )
        return DistributedDataParallel(self.megatron_config, ddp, module, disable_bucketing=number > 0)

    def _build_optimizers(self) -> list[MegatronOptimizer]:
        optim = self.config.optim
        chained = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=optim.lr,
                weight_decay=optim.weight_decay,
                adam_beta1=optim.betas[0],
                adam_beta2=optim.betas[1],
                adam_eps=optim.eps,
                # fp16 would bring a loss scale of its own; what matters here is that masters are kept.
                bf16=self.dtype != torch.float32,
                params_dtype=self.dtype,
                use_distributed_optimizer=self.config.engine.zero_stage == 1,
                clip_grad=0.0,
            ),
            [*self.chunks],
            use_gloo_process_groups=False,
        )
        assert isinstance(chained, ChainedOptimizer)
        optimizers = [
            optimizer for optimizer in chained.chained_optimizers if not getattr(optimizer, "is_stub_optimizer", False)
        ]
        for group in (group for optimizer in optimizers for group in optimizer.optimizer.param_groups):
            group["weight_decay"] = optim.weight_decay * group["wd_mult"]  # left to its scheduler, which we do not use
            group["fused"] = True
        return optimizers

    def train_step(self, step: int, micro_batches: Sequence[Batch], lr: float) -> StepResult:
        for chunk in self.chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        num_tokens = self._sum_over_data(sum(batch.num_valid_tokens for batch in micro_batches))
        loss_scale = self.loss_scale.scale if self.loss_scale else 1.0
        num_micro_batches = len(micro_batches) * self.layout.data
        self.routers.forget()
        loss_sum = self._run(
            micro_batches, step, Scales(loss_scale / max(1, num_tokens), loss_scale / num_micro_batches)
        )
        for optimizer in self.optimizers:
            optimizer.prepare_grads()
        if self.inspect_gradients:
            self.inspect_gradients(self._gradient_fragments(1 / loss_scale))
        grad_norm = self._grad_norm() / loss_scale  # the host waits here
        loss = loss_sum / max(1, num_tokens)
        finite = math.isfinite(grad_norm) and math.isfinite(loss)
        metrics = self.routers.step_metrics(num_micro_batches, self._total)
        if finite:
            self._update(grad_norm, loss_scale, lr)
            self.routers.rebalance()
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        if self.loss_scale:
            metrics["loss_scale"] = loss_scale
            self.loss_scale.update(finite)
        return StepResult(loss, grad_norm, num_tokens, skipped=not finite, metrics=metrics)

    def eval_step(self, micro_batches: Sequence[Batch]) -> EvalResult:
        for chunk in self.chunks:
            chunk.eval()
        loss_sum = self._run(micro_batches, None, Scales(1.0))
        return EvalResult(loss_sum, self._sum_over_data(sum(batch.num_valid_tokens for batch in micro_batches)))

    def _run(self, micro_batches: Sequence[Batch], step: int | None, scales: Scales) -> float:
        """Run the schedule; without a step, forward only. Returns the sum of the loss over all ranks' targets."""
        first, stride = self.groups.place.data, self.layout.data
        numbered = [(first + stride * i, batch.to(self.device)) for i, batch in enumerate(micro_batches)]
        reports = get_forward_backward_func()(
            forward_step_func=partial(self._forward, step, scales),
            data_iterator=[iter(numbered) for _ in self.chunks] if len(self.chunks) > 1 else iter(numbered),
            model=[*self.chunks] if len(self.chunks) > 1 else self.chunks[0],
            num_microbatches=len(micro_batches),
            seq_length=self.lengths.encoder + self.lengths.main,
            micro_batch_size=self.config.train.micro_batch_size,
            forward_only=step is None,
        )
        total = sum(reports, torch.zeros((), device=self.device)).double()
        dist.all_reduce(total)
        return float(total) / self.layout.tensor  # every tensor rank has the whole loss

    def _forward(
        self, step: int | None, scales: Scales, data: Iterator[MicroBatch], chunk: DistributedDataParallel
    ) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]]:
        number, batch = next(data)
        draws = None if step is None else Draws.of_micro_batch(self.config.seed, step, number, self.device)
        output, loss_sum, reports = chunk(batch, draws, scales)
        self.routers.add(reports)

        def report(objective: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            assert loss_sum is not None, "called on the last chunk only"
            # The number of tokens would divide the gradients at the end: ours are divided already.
            return objective, torch.ones((), dtype=torch.int, device=self.device), loss_sum.clone()

        return output, report

    def _total(self, sums: Tensor) -> Tensor:
        """Sums over all ranks; tensor ranks that hold the same tokens have counted each of them."""
        dist.all_reduce(sums)
        return sums if self.layout.sequence else sums / self.layout.tensor

    def _finalize(self, model: list[Any], num_tokens: Tensor | None = None, **options: Any) -> None:
        """megatron-core's reductions of gradients, without its division by the number of tokens, and those of tensors
        that it does not know of."""
        finalize_model_grads(model, None, **options)
        if self.layout.tensor > 1 and not self.layout.sequence:
            sum_over_ranks(self._reduced_grads(PARTIAL), self.groups.tensor)
        if self.layout.num_chunks > 1:
            for name in ON_SEVERAL_STAGES:
                self._sum_over_stages(name)

    def _reduced_grads(self, ends: tuple[str, ...]) -> list[Tensor]:
        """The gradients that DDP has reduced, of this rank's parameters whose names end so."""
        found: list[Any] = [parameter for parameter, place in self.placements.items() if place.name.endswith(ends)]
        return [parameter.main_grad for parameter in found]

    def _sum_over_stages(self, name: str) -> None:
        """Sum the gradients of a tensor's copies; every stage takes part, whether it has one or not."""
        if name not in parameter_shapes(self.config.model):
            return
        copies = self._reduced_grads((name,))
        rows, heads = parameter_shapes(self.config.model)[name]
        total = torch.zeros(rows, heads // self.layout.tensor, device=self.device)
        for grad in copies:
            total += grad
        dist.all_reduce(total, group=self.groups.pipeline)
        for grad in copies:
            grad.copy_(total)

    def _sum_over_data(self, count: int) -> int:
        total = torch.tensor(count, device=self.device)
        dist.all_reduce(total, group=self.groups.data)
        return int(total)

    def _grad_norm(self) -> float:
        return math.sqrt(sum(optimizer.get_grad_norm() ** 2 for optimizer in self.optimizers))

    @torch.no_grad()
    def _update(self, grad_norm: float, loss_scale: float, lr: float) -> None:
        factor = clip_factor(self.config.optim.grad_clip, grad_norm) / loss_scale
        for optimizer in self.optimizers:
            scale_gradients([p.grad for p in optimizer.get_parameters() if p.grad is not None], factor)
            for group in optimizer.optimizer.param_groups:
                group["lr"] = lr
            optimizer.step_with_ready_grads()  # under ZeRO it gathers the weights as well

    def _gather_weights(self) -> None:
        """Under ZeRO each rank has written a part of the weights: fetch the others."""
        if self.config.engine.zero_stage == 1:
            for chunk in self.chunks:
                chunk.start_param_sync(force_sync=True)

    def _fragments_of(self, master: Master, kind: str, data: Tensor) -> Iterator[Fragment]:
        placement = self.placements[master.parameter]
        flat = data.detach().flatten()
        for box, offset in iter_range_boxes(placement.box, *master.span):
            part = flat[offset : offset + box.num_elements].view(box.shape)
            yield Fragment(placement.name, kind, placement.global_shape, box, part)

    def _gradient_fragments(self, factor: float) -> Iterator[Fragment]:
        for master in self._owned_masters():
            if master.tensor.grad is not None:
                yield from self._fragments_of(master, "gradient", master.tensor.grad * factor)

    def _owned_masters(self) -> Iterator[Master]:
        """Masters that no other rank saves as well."""
        sharded = self.config.engine.zero_stage == 1
        for master in self.masters:
            placement, shared = self.placements[master.parameter], getattr(master.parameter, "shared", False)
            if placement.owned and not shared and (sharded or placement.replica == 0):
                yield master

    def fragments(self) -> Iterator[Fragment]:
        for master in self._owned_masters():
            yield from self._fragments_of(master, "master", master.tensor)
            for kind in ("exp_avg", "exp_avg_sq"):
                yield from self._fragments_of(master, kind, master.state[kind])
        if dist.get_rank() == 0:
            yield from self.routers.fragments()

    def load(self, source: FragmentSource) -> None:
        self.routers.load(source)
        for master in self.masters:
            for kind in ("exp_avg", "exp_avg_sq"):
                read_range(source, self.placements[master.parameter], kind, master.span, master.state[kind].view(-1))
        self.load_weights(source)

    @torch.no_grad()
    def load_weights(self, source: FragmentSource) -> None:
        for master in self.masters:
            target = master.tensor.detach().view(-1)
            read_range(source, self.placements[master.parameter], "master", master.span, target)
        for optimizer in self.optimizers:
            round_weights(optimizer)
        self._gather_weights()

    def state(self) -> dict[str, Any]:
        steps = self.masters[0].state["step"]
        return {"adam_steps": int(steps), "loss_scale": self.loss_scale.state() if self.loss_scale else None}

    def load_state(self, state: Mapping[str, Any]) -> None:
        for master in self.masters:
            master.state["step"].fill_(state["adam_steps"])
        if self.loss_scale and state["loss_scale"]:
            self.loss_scale.load_state(state["loss_scale"])


def first_layer(name: str, model: ModelConfig) -> int:
    """The number, among the layers of all stacks, of the first layer of a tensor's stack."""
    return model.encoder_layers if name.startswith("decoder.") else 0
