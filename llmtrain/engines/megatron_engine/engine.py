"""Whole optimizer steps on megatron-core's schedules, around our own modules."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from typing import Any, cast

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from llmtrain.config.model import ModelConfig
from llmtrain.config.parameters import Parameter, declare_parameters
from llmtrain.config.schema import RunConfig
from llmtrain.engines.base import Scales
from llmtrain.engines.masters import Master, Placement, make_state, moments_of, sum_over_ranks
from llmtrain.engines.megatron_engine.optimizers import LR_SCALE, build_optimizers, iter_pairs, round_weights
from llmtrain.engines.megatron_engine.pipeline_chunk import PipelineChunk, transformer_config
from llmtrain.engines.megatron_engine.zero_bubble import ZeroBubble, defer_weight_gradients
from llmtrain.engines.routers import Routers, iter_moe
from llmtrain.engines.stage import Stage, staged_teacher
from llmtrain.engines.step import SteppingEngine
from llmtrain.engines.teacher import Teacher
from llmtrain.models.attention.multi_head import join_projections
from llmtrain.models.compiled_graphs import compile_layers
from llmtrain.models.init import InitialWeights
from llmtrain.models.weight_gradients import WeightGradients
from llmtrain.parallel.cpu import call_cuda_tensors, stand_in_for_cuda
from llmtrain.parallel.groups import build_groups
from llmtrain.parallel.layout import Chunk, plan_chunks
from llmtrain.parallel.stateless_random import Draws
from llmtrain.parallel.tensor import mark_parameter
from llmtrain.values.batch import Batch
from llmtrain.values.precision import DTYPES

WORD = "embeddings.word.weight"
"""The word embedding. Tied to the head it lies on two stages, whose gradients megatron-core sums."""

MicroBatch = tuple[int, Batch]
"""A micro-batch with its number in the step, over all ranks."""


class MegatronEngine(SteppingEngine):
    """Tensor, sequence, pipeline, context and data parallelism, ZeRO stages 0 and 1.

    megatron-core reduces gradients and steps the optimizer. What it would decide about scales, norms and steps that are
    not finite is decided here, by the same rules as in every engine.
    """

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        stand_in_for_cuda()  # before the groups: building them calls torch.cuda
        super().__init__(config, device)
        self.groups = build_groups(self.layout)
        self.megatron_config = transformer_config(config, self.layout, DTYPES[config.train.precision])
        self.megatron_config.finalize_model_grads_func = self._finalize
        self.weight_gradients = WeightGradients() if self.layout.pipeline_schedule == "zero_bubble" else None
        self.declared = declare_parameters(config.model, config.finetune)
        self.placements: dict[nn.Parameter, Placement] = {}
        split, place = config.parallel.pipeline_split, self.groups.place.pipeline
        chunks = plan_chunks(self.layout, config.model.total_layers, split, place)
        self.chunks = [self._build_chunk(number, chunk) for number, chunk in enumerate(chunks)]
        self.megatron_optimizers = build_optimizers(config, self.row, self.chunks)
        self.pairs = [(each.optimizer, *pair) for each in self.megatron_optimizers for pair in iter_pairs(each)]
        for optimizer, _, main, _ in self.pairs:
            make_state(optimizer, self.row, [main])
        self.zero_bubble: ZeroBubble | None = None
        if self.weight_gradients is not None:
            (chunk,) = self.chunks
            length, size = config.lengths.encoder + config.lengths.main, config.train.micro_batch_size
            self.zero_bubble = ZeroBubble(chunk, self.weight_gradients, self.groups, length, size)
        stages = [cast(PipelineChunk, chunk.module).stage for chunk in self.chunks]
        self.routers = Routers(config, iter_moe(chain(*(stage.model.stacks for stage in stages))), device)
        self.load_weights(InitialWeights(config.model, config.seed, config.finetune))
        if config.distill is not None:
            self.teacher = Teacher(
                config, staged_teacher(config, self.groups, self.chunk_tokens), device, self.chunk_tokens
            )
        if self.joins_projections:
            # Last: ZeRO has moved the weights into its buffers, where they lie the other way round.
            for stage in stages:
                join_projections(stage, move=False)

    def _build_chunk(self, number: int, chunk: Chunk) -> DistributedDataParallel:
        stage = Stage(self.config, self.groups, chunk, self.chunk_tokens)
        if self.weight_gradients is not None:
            defer_weight_gradients(stage, self.weight_gradients)
        if self.compiles:
            compile_layers(layer for stack in stage.model.stacks for layer in stack.layers.values())
        stage.to_empty(device=self.device)
        stage.to(DTYPES[self.config.train.precision])
        if self.joins_projections:
            join_projections(stage, move=True)
        tied = self.config.model.ties_head and WORD not in self.config.frozen
        module = PipelineChunk(stage, self.megatron_config, tied, number)
        # Marks before DDP: by `allreduce` it chooses the buffer, and so the group, of each gradient.
        for parameter, placement in stage.part.named_placements():
            name, declared = placement.name, self.declared[placement.name]
            dim = declared.split if self.layout.tensor > 1 else None
            mark_parameter(parameter, dim, self.layout.sequence, declared.expert and self.layout.expert > 1)
            if declared.on_all_stages and parameter.requires_grad and self.layout.num_chunks > 1:
                # Gradients of parts of it are summed over stages: parts must be the same on all of them.
                parameter.shared_embedding = True  # type: ignore[attr-defined]  # read by megatron-core under this name
                parameter.shared = first_layer(name, self.config.model) not in chunk.layers  # type: ignore[attr-defined]
            setattr(parameter, LR_SCALE, self.config.optim.scale_of(name))
            self.placements[parameter] = placement
        word = module.shared_embedding_or_output_weight()
        if tied and self.layout.pipeline > 1 and word is not None:
            word.shared_embedding = True  # type: ignore[attr-defined]  # read by megatron-core under this name
            if not chunk.first:
                # The first stage's copy counts in the norm and is saved.
                word.shared = True  # type: ignore[attr-defined]
        call_cuda_tensors(stage.parameters())  # before the optimizers, which sort parameters by type names
        ddp = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=self.overlaps,
            use_distributed_optimizer=self.config.engine.zero_stage == 1,
        )
        # Buckets overlap reductions with the backward pass, which ends with the first chunk's gradients: the later
        # chunks' reductions are done by then.
        return DistributedDataParallel(self.megatron_config, ddp, module, disable_bucketing=number > 0)

    @property
    def data_group(self) -> dist.ProcessGroup:
        return self.groups.data

    @property
    def optimizers(self) -> Sequence[torch.optim.Optimizer]:
        return [optimizer.optimizer for optimizer in self.megatron_optimizers]

    def resident(self, write: bool = False) -> Iterator[list[Master]]:
        sharded = self.config.engine.zero_stage == 1
        yield [
            Master(
                place := self.placements[parameter],
                span,
                main.detach(),
                moments_of(optimizer, self.row, main),
                main.grad,
                # Nobody else's: not a copy for another stage, not a tensor replica, without ZeRO not a data replica.
                owned=place.owned and not getattr(parameter, "shared", False) and (sharded or place.replica == 0),
            )
            for optimizer, parameter, main, span in self.pairs
        ]

    def frozen(self) -> Iterator[Master]:
        for parameter, placement in self.placements.items():
            if not parameter.requires_grad:
                yield Master(placement, (0, parameter.numel()), parameter.detach())

    def run(self, micro_batches: Sequence[Batch], step: int | None, scales: Scales) -> Tensor:
        """Run the schedule; without a step, forward only."""
        for chunk in self.chunks:
            chunk.train(step is not None)
            if step is not None:
                chunk.zero_grad_buffer()  # DDP adds to its buffers, and no optimizer's `zero_grad` knows of them
        first, stride = self.groups.place.data, self.layout.data
        numbered = [(first + stride * i, batch.to(self.device)) for i, batch in enumerate(micro_batches)]
        forward = partial(self._forward, step, scales)
        if self.zero_bubble is not None and step is not None:
            reports = self.zero_bubble.run(forward, iter(numbered), len(numbered))
        else:
            micro_batch_size, seq_length = message_shape(micro_batches[0])
            reports = get_forward_backward_func()(
                forward_step_func=forward,
                data_iterator=[iter(numbered) for _ in self.chunks] if len(self.chunks) > 1 else iter(numbered),
                model=[*self.chunks] if len(self.chunks) > 1 else self.chunks[0],
                num_microbatches=len(numbered),
                seq_length=seq_length,
                micro_batch_size=micro_batch_size,
                forward_only=step is None,
            )
        return sum(reports, self.zero_sums(micro_batches, step))

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
            # A copy, because the schedule may divide in place what it is given.
            return objective, torch.ones((), dtype=torch.int, device=self.device), loss_sum.clone()

        return output, report

    def _finalize(self, model: list[Any], num_tokens: Tensor | None = None, **options: Any) -> None:
        """megatron-core's reductions of gradients, without its division by the number of tokens, and those of tensors
        that it does not know of."""
        finalize_model_grads(model, None, **options)  # first: it completes the overlapped reductions
        if self.layout.tensor > 1 and not self.layout.sequence:
            partial = {name for name, declared in self.declared.items() if declared.partial}
            sum_over_ranks(self._reduced_grads(partial), self.groups.tensor)
        if self.layout.num_chunks > 1:
            for declared in self.declared.values():
                if declared.on_all_stages and declared.name not in self.config.frozen:
                    self._sum_over_stages(declared)

    def _reduced_grads(self, names: set[str]) -> list[Tensor]:
        """The gradients that DDP has reduced, of this rank's parameters of these names."""
        found: list[Any] = [p for p, place in self.placements.items() if place.name in names and p.requires_grad]
        return [parameter.main_grad for parameter in found]

    def _sum_over_stages(self, declared: Parameter) -> None:
        """Sum the gradients of a tensor's copies; every stage takes part, whether it has one or not."""
        copies = self._reduced_grads({declared.name})
        rows, heads = declared.shape
        total = torch.zeros(rows, heads // self.layout.tensor, device=self.device)
        for grad in copies:
            total += grad
        # Stages without a copy add zeros: a collective that they left out would hang.
        dist.all_reduce(total, group=self.groups.pipeline)
        for grad in copies:
            grad.copy_(total)

    def reduce(self) -> None:
        """The schedule has reduced the gradients: they are handed to the masters."""
        for optimizer in self.megatron_optimizers:
            optimizer.prepare_grads()

    def update(self) -> None:
        for optimizer in self.megatron_optimizers:
            optimizer.step_with_ready_grads()  # under ZeRO it gathers the weights as well
        self.drop()

    def drop(self) -> None:
        for optimizer in self.megatron_optimizers:
            optimizer.zero_grad()

    def round_weights(self) -> None:
        for optimizer in self.megatron_optimizers:
            round_weights(optimizer)
        if self.config.engine.zero_stage == 1:  # each rank has written a part of the weights: fetch the others
            for chunk in self.chunks:
                chunk.start_param_sync(force_sync=True)


def message_shape(batch: Batch) -> tuple[int, int]:
    """Samples and positions of what stages send; an encoder-decoder sends both sequences."""
    samples, length = batch.tokens_BS.shape
    return samples, length + (0 if batch.encoder_tokens_BT is None else batch.encoder_tokens_BT.shape[1])


def first_layer(name: str, model: ModelConfig) -> int:
    """The number, among the layers of all stacks, of the first layer of a tensor's stack."""
    return model.encoder_layers if name.startswith("decoder.") else 0
