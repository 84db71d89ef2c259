"""Our models as modules that take and return plain tensors, with the memory of earlier tokens among them.

Shape suffixes: B batch, S new tokens, T tokens (of a decoder all so far, of an encoder its own), H hidden.
"""

from collections.abc import Iterator, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from llmtrain.models.attention.dense import DenseKeys, DenseSums, TextPlaces
from llmtrain.models.attention.scoring import Visibility
from llmtrain.models.stack import Layer, LayerCaches, Pass, Side, Stack, with_memory
from llmtrain.models.transformer import Transformer
from llmtrain.values.batch import PADDING, ModelInputs


class EncodingModule(nn.Module):
    """An encoder: (input_ids, attention_mask[, token_type_ids]) to hidden states [T, B, H]."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model = model

    def hidden(self, tokens_BT: Tensor, mask_BT: Tensor, types_BT: Tensor | None = None) -> Tensor:
        places = places_of(self.model, tokens_BT, mask_BT)
        caches = [LayerCaches(memory_of(self.model, places)) for _ in range(self.model.config.encoder_layers)]
        return through_stack(self.model, "encoder", tokens_BT, places, caches, types_BT=types_BT)


class MaskedModel(EncodingModule):
    """An encoder with a head for tokens or labels: its logits, of ends those of begins and of ends, and one vector for
    each text, as `embedding` makes it."""

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        tokens_BT, mask_BT, *types = tensors
        hidden_TBH = self.hidden(tokens_BT, mask_BT, types[0] if types else None)
        return (*head_logits(self.model, hidden_TBH, tokens_BT, mask_BT), mean_vector(hidden_TBH, mask_BT))


class MemoryMaker(EncodingModule):
    """The encoder of an encoder-decoder: what each layer of the decoder looks at, keys and values, and a vector."""

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        tokens_BT, mask_BT = tensors
        hidden_TBH = self.hidden(tokens_BT, mask_BT)
        assert self.model.decoder is not None
        found = []
        for layer in self.model.decoder.layers.values():
            assert isinstance(layer, Layer) and layer.cross_attention is not None
            pair = layer.cross_attention.keys_and_values_of_memory(hidden_TBH, None, None)
            found += [x_TBND.permute(1, 2, 0, 3) for x_TBND in pair]
        return (*found, mean_vector(hidden_TBH, mask_BT))


class TextDecoder(nn.Module):
    """A decoder: (input_ids, attention_mask, *memory) to (logits, *memory with the new tokens).

    The mask covers the tokens of before and the new ones. Behind an encoder its mask, and each layer's keys and values
    of what it has read, stand before the own memory.
    """

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        tokens_BS, mask_BT, *rest = tensors
        config, places = self.model.config, places_of(self.model, tokens_BS, mask_BT)
        cross: list[DenseKeys | None] = [None] * config.decoder_layers
        if self.model.has_memory:
            source = TextPlaces.of(rest.pop(0), 0, config.max_seq_len)  # the queries are none of its keys
            cross = [DenseKeys(source, (rest.pop(0), rest.pop(0))) for _ in cross]
        own = [memory_of(self.model, places, past) for past in grouped(rest, config.decoder_layers)]
        caches = [LayerCaches(one, other) for one, other in zip(own, cross, strict=True)]
        hidden_SBH = through_stack(self.model, "decoder", tokens_BS, places, caches)
        logits = self.model.logits(self.model.before_head(hidden_SBH))
        return (logits, *(tensor for memory in own for tensor in tensors_of(memory)))


class TextClassifier(nn.Module):
    """A decoder that classifies whole texts: (input_ids, attention_mask) to logits."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        tokens_BT, mask_BT = tensors
        places = places_of(self.model, tokens_BT, mask_BT)
        caches = [LayerCaches(memory_of(self.model, places)) for _ in range(self.model.config.decoder_layers)]
        hidden_TBH = through_stack(self.model, "decoder", tokens_BT, places, caches)
        return head_logits(self.model, hidden_TBH, tokens_BT, mask_BT)


def places_of(model: Transformer, tokens_BS: Tensor, mask_BT: Tensor) -> TextPlaces:
    """The tokens are the last of those that the mask covers."""
    return TextPlaces.of(mask_BT, tokens_BS.shape[1], model.config.max_seq_len)


def through_stack(
    model: Transformer,
    side: Side,
    tokens_BS: Tensor,
    places: TextPlaces,
    caches: Sequence[LayerCaches],
    types_BT: Tensor | None = None,
) -> Tensor:
    """[S, B, H] behind the last layer of one stack."""
    stack: Stack | None = model.encoder if side == "encoder" else model.decoder
    assert model.embeddings is not None and stack is not None, "a graph has all of a model"
    x_SBH = model.embeddings(tokens_BS, places.queries_BS, None, side, types_BT)
    shared = stack.inputs(Visibility(side == "decoder"), places.queries_BS, x_SBH, Pass())
    if caches[0].cross is not None:
        shared = with_memory(shared, x_SBH, None)  # the memory's keys are cached: nobody looks at it
    return stack(x_SBH, shared, caches)[0]


def head_logits(model: Transformer, hidden_TBH: Tensor, tokens_BT: Tensor, mask_BT: Tensor) -> tuple[Tensor, ...]:
    """[B, T, V] for tokens; for labels as `LabelHead` has them, but for ends two tensors [B, T]."""
    if not model.config.predicts_labels:
        return (model.logits(model.before_head(hidden_TBH)),)
    segments_BT = (mask_BT > 0).long() - 1
    assert PADDING == -1
    logits = model.logits(hidden_TBH, ModelInputs(tokens_BT, segments_BT, segments_BT))
    return logits.unbind(-1) if model.config.head == "span" else (logits,)


def mean_vector(hidden_TBH: Tensor, mask_BT: Tensor) -> Tensor:
    """[B, H], of length 1: the mean over what is no padding."""
    seen_TB1 = (mask_BT > 0).T[..., None].float()
    return F.normalize((hidden_TBH.float() * seen_TB1).sum(0) / seen_TB1.sum(0).clamp(min=1), dim=-1)


def memory_of(model: Transformer, places: TextPlaces, past: Sequence[Tensor] = ()) -> DenseKeys | DenseSums:
    """The memory of one layer's self-attention, with what came before."""
    if model.config.attention.kind == "linear":
        return DenseSums(places, past[0] if past else None)
    return DenseKeys(places, (past[0], past[1]) if past else None)


def tensors_of(memory: DenseKeys | DenseSums) -> Iterator[Tensor]:
    """What a memory holds, in the order in which it is given back."""
    if isinstance(memory, DenseSums):
        assert memory.sums is not None, "it has seen a token"
        yield memory.sums
    else:
        assert memory.pair is not None, "it has seen a token"
        yield from memory.pair


def grouped(tensors: Sequence[Tensor], groups: int) -> Iterator[Sequence[Tensor]]:
    size = len(tensors) // groups
    return (tensors[start : start + size] for start in range(0, len(tensors), size))
