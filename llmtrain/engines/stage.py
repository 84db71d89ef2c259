"""The part of a model that one rank runs: some of the layers, some of each layer, some of the sequence.

Shape suffixes: B micro-batch, S sequence, T the encoder's sequence (s, t: this rank's part), H hidden.
"""

from typing import cast

import torch
from torch import Tensor, nn

from llmtrain.config.parameter_shapes import parameter_shapes
from llmtrain.config.schema import RunConfig
from llmtrain.config.sequence_lengths import sample_lengths
from llmtrain.engines.assembly import cut, split_stacks
from llmtrain.engines.compilation import compile_layers
from llmtrain.engines.inputs import Scales, model_inputs
from llmtrain.engines.placement import Placement, split_box
from llmtrain.models.build import build_model
from llmtrain.models.cross_entropy import Objective, head_cross_entropy
from llmtrain.models.head import MlmHead
from llmtrain.models.sharding import is_expert, kind_of, split_dim
from llmtrain.models.transformer import (
    ModelInputs,
    Pass,
    Reports,
    Stack,
    counted_positions,
    encoder_visibility,
    main_visibility,
    with_memory,
)
from llmtrain.parallel.groups import Groups
from llmtrain.parallel.layout import Chunk
from llmtrain.parallel.stateless_random import Draws, Span
from llmtrain.parallel.tensor import TensorRegion, split_modules
from llmtrain.parallel.vocabulary import VocabularyPart
from llmtrain.values.batch import Batch

StageOutput = tuple[Tensor, Tensor | None, Reports]
"""Hidden states for the next chunk, or of the last one the scaled loss to call backward on; the detached sum of the
loss, of the last one; and the reports of the chunk's routers."""


class Stage(nn.Module):
    """One chunk of the layers, split over tensor, context and expert ranks, on the meta device until it has memory.

    The batch is whole on every rank: the stage cuts its own part of the sequence. A chunk that is not the first starts
    from `received`. Between chunks an encoder-decoder passes one tensor: the decoder's positions behind the encoder's.
    """

    def __init__(self, config: RunConfig, groups: Groups, chunk: Chunk) -> None:
        super().__init__()
        self.model_config = config.model
        self.chunk_tokens = config.train.loss_chunk_tokens
        self.groups, self.chunk = groups, chunk
        self.lengths = sample_lengths(config.model.family, config.data)
        self.received: Tensor | None = None
        self.region = TensorRegion(groups.tensor, groups.layout.sequence) if groups.layout.tensor > 1 else None
        whole = build_model(config.model, config.train.recompute)
        self.global_shapes = parameter_shapes(config.model)
        with torch.device("meta"):
            split_stacks(whole, groups, self.region)
            if self.region is not None:
                split_modules(whole, kind_of, self.region)
        self.parts = cut(whole, chunk, config.model)
        if config.train.compile:
            compile_layers(layer for stack in self.stacks for layer in stack.layers.values())
        self.vocabulary = VocabularyPart.of_rank(config.model.padded_vocab_size, config.model.vocabulary, groups.tensor)
        if self.region is None:
            self.vocabulary = VocabularyPart(0, config.model.vocabulary)

    @property
    def stacks(self) -> list[Stack]:
        """Those of which this chunk has a part, in the order in which data flows."""
        return [cast(Stack, self.parts[side]) for side in ("encoder", "decoder") if side in self.parts]

    def named_placements(self) -> list[tuple[nn.Parameter, Placement]]:
        """Each parameter with its place in the global tensors."""
        layout, place = self.groups.layout, self.groups.place
        expert, expert_replica = layout.expert_place(place)
        found = []
        for name, parameter in self.parts.named_parameters():
            cuts = {}
            dim = split_dim(name) if layout.tensor > 1 else None
            if dim is not None:
                cuts[dim] = (place.tensor, layout.tensor)
            if is_expert(name):
                cuts[0] = (expert, layout.expert)
            shape = self.global_shapes[name]
            owned = dim is not None or place.tensor == 0
            replica = expert_replica if is_expert(name) else self.groups.data_context.rank()
            found.append((parameter, Placement(name, shape, split_box(shape, cuts), owned, replica)))
        return found

    def forward(self, batch: Batch, draws: Draws | None, scales: Scales) -> StageOutput:
        inputs, reports = model_inputs(batch), {}
        enc_tBH, x_sBH = self.start(inputs, draws)
        if "encoder" in self.parts and self.model_config.family == "encoder_decoder":
            stack = cast(Stack, self.parts["encoder"])
            inside, run = self.inside(self.lengths.encoder), self.run(draws, self.lengths.encoder, scales)
            positions_Bt = counted_positions(required(inputs.encoder_tokens_BT))[:, inside]
            shared = stack.inputs(encoder_visibility(inputs.encoder_segments_BT), positions_Bt, required(enc_tBH), run)
            enc_tBH, reports = stack(enc_tBH, shared)
        stack = self.main_stack
        if stack is not None:
            inside, run = self.inside(self.lengths.main), self.run(draws, self.lengths.main, scales)
            visible = main_visibility(self.model_config, inputs)
            shared = stack.inputs(visible, inputs.positions_BS[:, inside], x_sBH, run)
            if enc_tBH is not None and stack.layers:
                memory_TBH = enc_tBH if self.region is None else self.region.enter(enc_tBH)
                shared = with_memory(shared, memory_TBH, inputs.encoder_segments_BT)
            x_sBH, more = stack(x_sBH, shared)
            reports = {**reports, **more}
        if not self.chunk.last:
            return (x_sBH if enc_tBH is None else torch.cat((enc_tBH, x_sBH))), None, reports
        loss, loss_sum = self.loss(x_sBH, batch.labels_BS, scales.loss)
        return loss, loss_sum, reports

    @property
    def main_stack(self) -> Stack | None:
        """The stack that the head stands on, where this chunk has a part of it."""
        side = "encoder" if self.model_config.family == "encoder" else "decoder"
        return cast(Stack, self.parts[side]) if side in self.parts else None

    def start(self, inputs: ModelInputs, draws: Draws | None) -> tuple[Tensor | None, Tensor]:
        """What comes into the chunk's layers: the encoder's part in an encoder-decoder, and the main sequence's."""
        if not self.chunk.first:
            assert self.received is not None, "the schedule hands over the previous chunk's output"
            if self.model_config.family != "encoder_decoder":
                return None, self.received
            length = self.lengths.encoder // self.groups.layout.sequence_parts
            return self.received[:length], self.received[length:]
        side = "encoder" if self.model_config.family == "encoder" else "decoder"
        x_sBH = self.embed(inputs.tokens_BS, inputs.positions_BS, draws, side)
        if self.model_config.family != "encoder_decoder":
            return None, x_sBH
        tokens_BT = required(inputs.encoder_tokens_BT)
        return self.embed(tokens_BT, counted_positions(tokens_BT), draws, "encoder"), x_sBH

    def embed(self, tokens_BS: Tensor, positions_BS: Tensor, draws: Draws | None, side: str) -> Tensor:
        length = tokens_BS.shape[1]
        run = self.run(draws, length, Scales(0.0))
        # The word embedding scatters its own output; what is added to it has to be the same part.
        outside = self.groups.sequence_parts().own(length)
        return self.parts["embeddings"](tokens_BS[:, self.inside(length)], positions_BS[:, outside], run.draws, side)

    def run(self, draws: Draws | None, length: int, scales: Scales) -> Pass:
        """The draws of this rank's part of a sequence, and the factor of balancing losses."""
        own = self.groups.sequence_parts().own(length)
        return Pass(None if draws is None else draws.with_sequence(Span(own.start, length)), scales.balance)

    def inside(self, length: int) -> slice:
        """This rank's part of a sequence inside of blocks: all of it, but for context parallel."""
        return self.groups.sequence_parts().block(length, length // self.groups.layout.context)

    def loss(self, x_sBH: Tensor, labels_BS: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """(scaled loss, detached sum of the loss) of this rank's part of the targets."""
        bias_V = None
        if "mlm" in self.parts:
            mlm = cast(MlmHead, self.parts["mlm"])
            x_sBH, bias_V = mlm(x_sBH), mlm.bias[: self.vocabulary.rows]
        if self.model_config.scaled_head:
            x_sBH = x_sBH * self.model_config.hidden_size**-0.5
        if self.region is not None:
            x_sBH = self.region.enter(x_sBH)
        labels_T = labels_BS[:, self.inside(self.lengths.main)].T.flatten()
        objective = Objective(scale, self.chunk_tokens, self.vocabulary)
        return head_cross_entropy(x_sBH.flatten(0, 1), self.head_weight, labels_T, objective, bias_V)

    @property
    def head_weight(self) -> Tensor:
        """This rank's rows of the head, without padding; tied, they are the word embedding's."""
        head = self.parts["head"] if "head" in self.parts else self.parts["embeddings"].get_submodule("word")
        return head.get_parameter("weight")[: self.vocabulary.rows]


def required(tensor: Tensor | None) -> Tensor:
    assert tensor is not None, "batches of an encoder-decoder have the encoder's tokens"
    return tensor
