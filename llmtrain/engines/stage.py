"""The part of a model that one rank runs: some of the layers, some of each layer, some of the sequence."""

import torch
from torch import Tensor, nn

from llmtrain.config.parameters import declare_parameters
from llmtrain.config.schema import RunConfig
from llmtrain.engines.assembly import cut, split_stacks
from llmtrain.engines.base import Scales
from llmtrain.engines.placement import Placement, split_box
from llmtrain.engines.precision import freeze
from llmtrain.models.compiled_graphs import compile_layers
from llmtrain.models.cross_entropy import Objective
from llmtrain.models.stack import Pass, Reports
from llmtrain.models.transformer import build_model
from llmtrain.parallel.groups import Groups
from llmtrain.parallel.layout import Chunk
from llmtrain.parallel.stateless_random import Draws
from llmtrain.parallel.tensor import TensorRegion, split_modules
from llmtrain.parallel.vocabulary import VocabularyPart
from llmtrain.values.batch import Batch

StageOutput = tuple[Tensor, Tensor | None, Reports]
"""Hidden states for the next chunk, or of the last one the scaled loss to call backward on; the detached sum of the
loss, of the last one; and the reports of the chunk's routers."""


class Stage(nn.Module):
    """One chunk of the layers, split over tensor, context and expert ranks, on the meta device until it has memory.

    The batch is whole on every rank: the model cuts its own part of the sequence. A chunk that is not the first starts
    from `received`. Between chunks an encoder-decoder passes one tensor: the decoder's positions behind the encoder's.
    """

    def __init__(self, config: RunConfig, groups: Groups, chunk: Chunk) -> None:
        super().__init__()
        self.chunk_tokens = config.train.loss_chunk_tokens
        self.groups, self.chunk = groups, chunk
        self.received: Tensor | None = None
        region = TensorRegion(groups.tensor, groups.layout.sequence) if groups.layout.tensor > 1 else None
        self.model = build_model(config.model, config.train.recompute)
        self.declared = declare_parameters(config.model)
        with torch.device("meta"):
            split_stacks(self.model, self.declared, groups, region)
            if region is not None:
                split_modules(self.model, self.declared, region)
                self.model.enter = region.enter
        self.model.parts, self.model.attention_parts = groups.sequence_parts(), groups.layout.context
        cut(self.model, chunk)
        freeze(dict(self.model.named_parameters()), config.optim.freeze)
        if config.train.compile:
            compile_layers(layer for stack in self.model.stacks for layer in stack.layers.values())
        self.vocabulary = VocabularyPart(0, config.model.vocabulary)
        if region is not None:
            padded, size = config.model.padded_vocab_size, config.model.vocabulary
            self.vocabulary = VocabularyPart.of_rank(padded, size, groups.tensor)

    def named_placements(self) -> list[tuple[nn.Parameter, Placement]]:
        """Each parameter with its place in the global tensors."""
        layout, place = self.groups.layout, self.groups.place
        expert, expert_replica = layout.expert_place(place)
        found = []
        for name, parameter in self.model.named_parameters():
            declared, cuts = self.declared[name], {}
            is_split = declared.split is not None and layout.tensor > 1
            if is_split:
                cuts[declared.split] = (place.tensor, layout.tensor)
            if declared.expert:
                cuts[0] = (expert, layout.expert)
            owned = is_split or place.tensor == 0
            replica = expert_replica if declared.expert else self.groups.data_context.rank()
            box = split_box(declared.shape, cuts)
            found.append((parameter, Placement(name, declared.shape, box, owned, replica)))
        return found

    def forward(self, batch: Batch, draws: Draws | None, scales: Scales) -> StageOutput:
        hidden_sBH, reports = self.model(batch, Pass(draws, scales.balance), received=self.received)
        if not self.chunk.last:
            # A schedule goes backward through every chunk, also through one that has nothing to train.
            if torch.is_grad_enabled() and not hidden_sBH.requires_grad:
                hidden_sBH.requires_grad_()
            return hidden_sBH, None, reports
        objective = Objective(scales.loss, self.chunk_tokens, self.vocabulary)
        return *self.model.loss(hidden_sBH, batch.labels_BS, objective), reports
