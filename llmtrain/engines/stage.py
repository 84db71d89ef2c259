"""One chunk of a model's layers, and its loss, as an engine runs it on one rank."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from llmtrain.config.rules.distill import teacher_run
from llmtrain.config.schema import ContextExchange, RunConfig
from llmtrain.engines.base import Scales
from llmtrain.engines.masters import freeze
from llmtrain.engines.part import ModelPart
from llmtrain.engines.teacher import TeacherPart
from llmtrain.models.attention.multi_head import Attention
from llmtrain.models.float8 import multiply_in_float8
from llmtrain.models.head import Objective
from llmtrain.models.rounded_products import Rounding
from llmtrain.models.stack import Pass, Reports
from llmtrain.models.transformer import Transformer, build_model, chosen_from
from llmtrain.parallel.context import spread_over_context
from llmtrain.parallel.groups import Groups
from llmtrain.parallel.layout import Chunk, plan_chunks
from llmtrain.parallel.parts import VocabularyPart
from llmtrain.parallel.ring import Ring
from llmtrain.parallel.stateless_random import Draws
from llmtrain.parallel.tensor import TensorRegion
from llmtrain.values.batch import Batch
from llmtrain.values.precision import DTYPES


def join_context(whole: Transformer, groups: Groups, exchange: ContextExchange) -> None:
    """Let attention see what the other context ranks hold of the sequence. Call when heads are split."""
    for attention in whole.modules():
        if not isinstance(attention, Attention):
            continue
        if exchange == "ring":
            attention.ring = Ring(groups.context, whole.parts.balanced)
        else:
            heads = attention.num_heads // groups.layout.tensor // groups.layout.context
            attention.first_head += groups.place.context * heads
            attention.attend = spread_over_context(attention.attend, groups.context)


StageOutput = tuple[Tensor, Tensor | None, Reports]
"""Hidden states for the next chunk, or of the last one the scaled loss to call backward on; the detached sum of the
loss, of the last one; and the reports of the chunk's routers."""


class Stage(nn.Module):
    """One chunk of the layers, split over tensor, context and expert ranks, on the meta device until it has memory.

    The batch is whole on every rank: the model cuts its own part of the sequence. A chunk that is not the first starts
    from `received`. Between chunks an encoder-decoder passes one tensor: the decoder's positions behind the encoder's.
    """

    def __init__(self, config: RunConfig, groups: Groups, chunk: Chunk, chunk_tokens: int) -> None:
        super().__init__()
        self.chunk_tokens = chunk_tokens
        self.groups, self.chunk = groups, chunk
        self.received: Tensor | None = None
        region = None
        if groups.layout.tensor > 1:
            full = config.train.recompute == "full"
            region = TensorRegion(groups.tensor, groups.layout.sequence, keeps_whole=full)
        self.model = build_model(config.model, config.train.recompute)
        self.model.parts = groups.sequence_parts(config.balances_context)
        rounding = Rounding(config.quantize, DTYPES[config.train.precision], config.frozen) if config.quantize else None
        self.part = ModelPart(self.model, config.finetune, groups, chunk, region, rounding)
        if groups.layout.context > 1:
            join_context(self.model, groups, config.context_exchange)
        if config.train.precision == "fp8":
            multiply_in_float8(self.model)
        freeze(dict(self.model.named_parameters()), config.frozen)
        self.vocabulary = chosen_from(config.model)
        if region is not None and not config.model.predicts_labels:
            padded, size = config.model.padded_vocab_size, config.model.vocabulary
            self.vocabulary = VocabularyPart.of_rank(padded, size, groups.tensor)

    def forward(self, batch: Batch, draws: Draws | None, scales: Scales) -> StageOutput:
        hidden_sBH, reports = self.model(batch, Pass(draws, scales.balance), received=self.received)
        if not self.chunk.last:
            # A schedule goes backward through every chunk, also through one that has nothing to train.
            if torch.is_grad_enabled() and not hidden_sBH.requires_grad:
                hidden_sBH.requires_grad_()
            return hidden_sBH, None, reports
        objective = Objective(scales.loss, self.chunk_tokens, self.vocabulary, draws)
        return *self.model.loss(hidden_sBH, batch.labels_BS, objective, batch), reports


def staged_teacher(config: RunConfig, groups: Groups, chunk_tokens: int) -> TeacherPart:
    """The teacher's stage on this rank: one, since a virtual pipeline and the split of its layers are the student's."""
    run = teacher_run(config)
    layout = replace(groups.layout, virtual_pipeline=1, pipeline_schedule=None)
    (chunk,) = plan_chunks(layout, run.model.total_layers, None, groups.place.pipeline)
    stage = Stage(run, groups, chunk, chunk_tokens)
    # No parameter is made anew when the model gets memory: the order is that of `parameters()`.
    places = [placement for _, placement in stage.part.named_placements()]
    return TeacherPart(stage.model, stage.vocabulary, places, groups.pipeline if layout.pipeline > 1 else None)
