"""The part of a model that one rank runs: some of the layers, some of each layer, some of the sequence.

Shape suffixes: B micro-batch, S sequence (s: this rank's part), H hidden.
"""

import torch
from torch import Tensor, nn

from llmtrain.config.schema import RunConfig
from llmtrain.data.batch import Batch
from llmtrain.engines.compilation import compile_layers
from llmtrain.engines.placement import Placement, split_placement
from llmtrain.models.attention import Attention, AttentionInputs
from llmtrain.models.build import build_model
from llmtrain.models.cross_entropy import Objective, head_cross_entropy
from llmtrain.models.positions import rotary_angles
from llmtrain.models.sharding import DECODER, kind_of, split_dim
from llmtrain.models.transformer import Transformer
from llmtrain.models.visibility import Visibility
from llmtrain.parallel.context import spread_over_context
from llmtrain.parallel.draws import Draws, Span
from llmtrain.parallel.groups import Groups
from llmtrain.parallel.layout import Chunk
from llmtrain.parallel.tensor import TensorRegion, split_modules
from llmtrain.parallel.vocabulary import VocabularyPart


class Stage(nn.Module):
    """One chunk of the layers, split over tensor and context ranks, on the meta device until it is materialized.

    Called with a batch it returns hidden states [s, B, H], or, as the last chunk, (scaled loss, sum of the loss). The
    batch is whole on every rank: the stage cuts its own part of the sequence. A chunk that is not the first starts from
    `received`.
    """

    def __init__(self, config: RunConfig, groups: Groups, chunk: Chunk) -> None:
        super().__init__()
        self.model_config = config.model
        self.chunk_tokens = config.train.loss_chunk_tokens
        self.groups = groups
        self.chunk = chunk
        self.received: Tensor | None = None
        self.region = TensorRegion(groups.tensor, groups.layout.sequence) if groups.layout.tensor > 1 else None
        whole = build_model(config.model, config.train.recompute)
        self.global_shapes = {name: tuple(parameter.shape) for name, parameter in whole.named_parameters()}
        if self.region is not None:
            with torch.device("meta"):
                split_modules(whole, lambda name: kind_of(name, DECODER), self.region)
        for module in whole.modules():
            if isinstance(module, Attention):
                place_heads(module, groups)
        self.parts = cut(whole, chunk)
        if config.train.compile:
            compile_layers(whole.decoder.layers.values())
        self.vocabulary = VocabularyPart.of_rank(config.model.padded_vocab_size, config.model.vocabulary, groups.tensor)
        if self.region is None:
            self.vocabulary = VocabularyPart(0, config.model.vocabulary)

    def named_placements(self) -> list[tuple[nn.Parameter, Placement]]:
        """Each parameter with its place in the global tensors."""
        layout, place = self.groups.layout, self.groups.place
        found = []
        for name, parameter in self.parts.named_parameters():
            dim = split_dim(name, DECODER) if layout.tensor > 1 else None
            placement = split_placement(name, self.global_shapes[name], dim, place.tensor, layout.tensor)
            found.append((parameter, placement))
        return found

    @property
    def head_weight(self) -> Tensor:
        """This rank's rows of the head, without padding; tied, they are the word embedding's."""
        head = self.parts["head"] if "head" in self.parts else self.parts["embeddings"].get_submodule("word")
        return head.get_parameter("weight")[: self.vocabulary.rows]

    def forward(self, batch: Batch, draws: Draws | None, scale: float) -> Tensor | tuple[Tensor, Tensor]:
        seq_len = batch.tokens_BS.shape[1]
        inside, outside = self.sequence_parts(seq_len)
        local_draws = None if draws is None else draws.with_sequence(Span(outside.start, seq_len))
        if self.chunk.first:
            # The word embedding scatters its own output; what is added to it has to be the same part.
            x_sBH = self.parts["embeddings"](batch.tokens_BS[:, inside], batch.positions_BS[:, outside], local_draws)
        else:
            assert self.received is not None, "the schedule hands over the previous chunk's output"
            x_sBH = self.received
        rotary = None
        if self.model_config.position == "rope":
            rotary = rotary_angles(self.model_config, batch.positions_BS[:, inside], x_sBH.dtype)
        visible = Visibility(queries_BS=batch.segments_BS, keys_BT=batch.segments_BS)
        x_sBH = self.parts["decoder"](x_sBH, AttentionInputs(rotary, visible, None, local_draws))
        if not self.chunk.last:
            return x_sBH
        if self.region is not None:
            x_sBH = self.region.enter(x_sBH)
        labels_T = batch.labels_BS[:, inside].T.flatten()
        objective = Objective(scale, self.chunk_tokens, self.vocabulary)
        return head_cross_entropy(x_sBH.flatten(0, 1), self.head_weight, labels_T, objective)

    def sequence_parts(self, seq_len: int) -> tuple[slice, slice]:
        """This rank's part of the sequence inside of blocks (all, but for context parallel), and outside of them."""
        layout, place = self.groups.layout, self.groups.place
        inside = seq_len // layout.context
        start = place.context * inside
        if not layout.sequence:
            return slice(start, start + inside), slice(start, start + inside)
        outside = inside // layout.tensor
        begin = start + place.tensor * outside
        return slice(start, start + inside), slice(begin, begin + outside)


def place_heads(attention: Attention, groups: Groups) -> None:
    """Tell an attention which heads it computes, and let it trade the sequence for heads among the context ranks."""
    tensor_heads = attention.num_heads // groups.layout.tensor
    context_heads = tensor_heads // groups.layout.context
    attention.tensor_first_head = groups.place.tensor * tensor_heads
    attention.first_head = attention.tensor_first_head + groups.place.context * context_heads
    if groups.layout.context > 1:
        attention.attend = spread_over_context(attention.attend, groups.context)


def cut(whole: Transformer, chunk: Chunk) -> nn.ModuleDict:
    """What a chunk needs of a model: its layers, and at either end the embeddings and the head."""
    for number in list(whole.decoder.layers):
        if int(number) not in chunk.layers:
            del whole.decoder.layers[number]
    if not chunk.last:
        whole.decoder.final_norm = None
    parts = nn.ModuleDict()
    if chunk.first:
        parts["embeddings"] = whole.embeddings
    parts["decoder"] = whole.decoder
    if chunk.last and whole.head is not None:
        parts["head"] = whole.head
    elif chunk.last and not chunk.first:
        parts["embeddings"] = nn.ModuleDict({"word": whole.embeddings.word})
    return parts
