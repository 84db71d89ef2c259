"""The model, or a run of its layers: embeddings, one or two stacks, a head. Plain single-device PyTorch.

Shape suffixes: B micro-batch, S sequence, T the encoder's sequence (s, t: this rank's part), H hidden, V vocabulary.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from llmtrain.config.model import ModelConfig
from llmtrain.models.attention.scoring import Visibility
from llmtrain.models.compiled_graphs import dropped
from llmtrain.models.head import Head, MlmHead, Objective, head_cross_entropy, text_sums
from llmtrain.models.label_heads import Pooler, build_classifier
from llmtrain.models.label_loss import LabelHead
from llmtrain.models.pointwise import Recompute, build_norm, identity
from llmtrain.models.positions import sinusoids
from llmtrain.models.stack import LayerCaches, Pass, Reports, Side, Stack, with_memory
from llmtrain.parallel.parts import WHOLE, SequenceParts, VocabularyPart
from llmtrain.parallel.stateless_random import Draws, site_key
from llmtrain.values.batch import Batch, ModelInputs


def build_lookup(rows: int, size: int) -> nn.Embedding:
    """A table whose first numbers somebody else draws: where PyTorch does, on the meta device, it imports its compiler,
    which takes a second."""
    return nn.Embedding(rows, size, _weight=torch.empty(rows, size))


class Embeddings(nn.Module):
    """The sum of the word embedding, for learned and sinusoidal positions the position's, and where there are token
    types that of the token's: 0 unless the batch says otherwise."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.sinusoidal = config.position == "sinusoidal"
        self.dropout = config.dropout
        self.dropout_sites = {"decoder": site_key("embeddings"), "encoder": site_key("embeddings", "encoder")}
        self.word = build_lookup(config.padded_vocab_size, config.hidden_size)
        learned = config.position == "learned"
        self.position = build_lookup(config.max_seq_len, config.hidden_size) if learned else None
        self.token_type = build_lookup(config.token_types, config.hidden_size) if config.token_types else None
        self.norm = build_norm(config) if config.embedding_norm else None
        self.prompt: nn.Embedding | None = None
        """The soft prompt: embeddings of the first positions, whatever their tokens, of what the model reads."""
        self.prompt_side = "encoder" if config.encoder_layers else "decoder"

    def forward(
        self, tokens_BS: Tensor, positions_BS: Tensor, draws: Draws | None, side: str, types_Bs: Tensor | None = None
    ) -> Tensor:
        """[S, B, H]; `side` is the stack that it is for."""
        x_SBH = self.word(tokens_BS).transpose(0, 1)
        if self.prompt is not None and side == self.prompt_side:
            x_SBH = self._prompted(x_SBH, positions_BS)
        if self.position is not None:
            x_SBH = x_SBH + self.position(positions_BS).transpose(0, 1)
        if self.sinusoidal:
            x_SBH = x_SBH + sinusoids(positions_BS, x_SBH.shape[-1]).to(x_SBH.dtype)
        if self.token_type is not None and types_Bs is None:
            x_SBH = x_SBH + self.token_type(tokens_BS.new_zeros(1))
        elif self.token_type is not None and types_Bs is not None:
            x_SBH = x_SBH + self.token_type(types_Bs).transpose(0, 1)
        # Else the activations would stay transposed through all layers, and gloo sends contiguous memory only.
        x_SBH = x_SBH.contiguous()
        x_SBH = x_SBH if self.norm is None else self.norm(x_SBH)
        return dropped(x_SBH, self.dropout, self.dropout_sites[side], draws)

    def _prompted(self, x_SBH: Tensor, positions_BS: Tensor) -> Tensor:
        """Embeddings of words, or of the prompt where it stands."""
        assert self.prompt is not None
        length = self.prompt.num_embeddings
        prompt_SBH = self.prompt(positions_BS.clamp(max=length - 1)).transpose(0, 1)
        return torch.where((positions_BS < length).T[..., None], prompt_SBH, x_SBH)


class Transformer(nn.Module):
    """A decoder, an encoder, or both. A tied head has no weight of its own.

    A pipeline stage is the same class with absent ends: without `starts` it goes on from what the stage before has
    returned, without `ends` it returns what the next one goes on from, and layers, stacks and modules of the other
    stages are not there. Inputs are whole on every rank: where ranks hold parts of the sequence, `parts` says which,
    and `enter` brings a part to where all that blocks see of it is needed.
    """

    def __init__(self, config: ModelConfig, recompute: Recompute = "none") -> None:
        super().__init__()
        self.config = config
        self.starts = self.ends = True
        self.parts: SequenceParts = WHOLE
        self.enter: Callable[[Tensor], Tensor] = identity
        self.embeddings: Embeddings | None = Embeddings(config)
        self.encoder = Stack(config, "encoder", recompute) if config.encoder_layers else None
        self.decoder = Stack(config, "decoder", recompute) if config.decoder_layers else None
        self.mlm = MlmHead(config) if config.head == "mlm" else None
        self.pooler = Pooler(config) if config.has_pooler else None
        self.classifier = build_classifier(config)
        self.span = nn.Linear(config.hidden_size, config.num_classes) if config.head == "span" else None
        no_head = config.ties_head or config.predicts_labels
        self.head = None if no_head else nn.Linear(config.hidden_size, config.padded_vocab_size, bias=False)

    @property
    def stacks(self) -> Sequence[Stack]:
        """The stacks that are present, in the order in which data flows."""
        return [stack for stack in (self.encoder, self.decoder) if stack is not None]

    @property
    def prompt_tokens(self) -> int:
        """Positions that a soft prompt takes before each text."""
        prompt = self.embeddings.prompt if self.embeddings is not None else None
        return 0 if prompt is None else prompt.num_embeddings

    @property
    def has_memory(self) -> bool:
        """True where an encoder's output goes along with the decoder's hidden states."""
        return self.config.family == "encoder_decoder"

    @property
    def main_side(self) -> Side:
        """The stack that the head stands on."""
        return "encoder" if self.config.family == "encoder" else "decoder"

    @property
    def label_head(self) -> LabelHead:
        """The head of a model that predicts labels."""
        return LabelHead(self.config, self.parts, self.pooler, self.classifier, self.span)

    def forward(
        self,
        inputs: ModelInputs,
        run: Pass | None = None,
        caches: Iterable[LayerCaches] | None = None,
        memory_TBH: Tensor | None = None,
        received: Tensor | None = None,
    ) -> tuple[Tensor, Reports]:
        """Hidden states for the head, [s, B, H], and what routers have counted.

        `memory_TBH` is what `encode` has returned, where the encoder need not run again. `received` is what the stage
        before has returned: of an encoder-decoder, the encoder's positions and behind them the decoder's.
        """
        run, reports = run or Pass(), {}
        encoded_tBH, x_sBH = self._begin(inputs, run, received, memory_TBH)
        if self.has_memory and self.encoder is not None and memory_TBH is None:
            encoded_tBH, reports = self._encode(inputs, run, encoded_tBH)
        stack = self.encoder if self.main_side == "encoder" else self.decoder
        if stack is not None:
            inside_Bs = self._inside(inputs.positions_BS)  # attention sees more than this rank's part
            visible, local_run = main_visibility(self.config, inputs), self._local_pass(run, inputs.tokens_BS)
            shared = stack.inputs(visible, inside_Bs, x_sBH, local_run)
            if encoded_tBH is not None and stack.layers:
                shared = with_memory(shared, self.enter(encoded_tBH), inputs.encoder_segments_BT)
            x_sBH, more = stack(x_sBH, shared, caches)
            reports = {**reports, **more}
        if not self.ends:
            return (x_sBH if encoded_tBH is None else torch.cat((encoded_tBH, x_sBH))), reports
        if self.config.predicts_labels:
            return x_sBH, reports  # whole on every rank, which does its own part
        # Under tensor parallelism the vocabulary of the head needs the whole sequence.
        return self.enter(self.before_head(x_sBH)), reports

    def before_head(self, x_SBH: Tensor) -> Tensor:
        """What stands between the layers and the matrix of the head."""
        x_SBH = x_SBH if self.mlm is None else self.mlm(x_SBH)
        return x_SBH * self.config.hidden_size**-0.5 if self.config.scaled_head else x_SBH

    def _begin(
        self, inputs: ModelInputs, run: Pass, received: Tensor | None, memory_TBH: Tensor | None
    ) -> tuple[Tensor | None, Tensor]:
        """The input of the layers: (of an encoder-decoder the encoder's part, the main sequence's)."""
        if self.starts:
            # In this order: gradients of the shared embedding are added up in the reverse one.
            source = self._embed_source(inputs, run) if self.has_memory and memory_TBH is None else memory_TBH
            types_BS = inputs.token_types_BS
            return source, self._embed(inputs.tokens_BS, inputs.positions_BS, run, self.main_side, types_BS)
        assert received is not None, "the schedule hands over what the stage before has returned"
        if not self.has_memory:
            return None, received
        assert inputs.encoder_tokens_BT is not None, "batches of an encoder-decoder have the encoder's tokens"
        # Stages pass one tensor: this rank's encoder positions, and behind them its decoder positions.
        own = self.parts.own(inputs.encoder_tokens_BT.shape[1])
        return received[: own.size], received[own.size :]

    def _embed_source(self, inputs: ModelInputs, run: Pass) -> Tensor:
        assert inputs.encoder_tokens_BT is not None, "batches of an encoder-decoder have the encoder's tokens"
        tokens_BT = inputs.encoder_tokens_BT
        return self._embed(tokens_BT, counted_positions(tokens_BT), run, "encoder")

    def _embed(
        self, tokens_BS: Tensor, positions_BS: Tensor, run: Pass, side: Side, types_BS: Tensor | None = None
    ) -> Tensor:
        assert self.embeddings is not None, "a model that starts has them"
        # The word embedding of tensor ranks scatters its own output; what is added to it has to be the same part.
        own = self.parts.own(tokens_BS.shape[1])
        own_Bs, types_Bs = own.of(positions_BS, 1), None if types_BS is None else own.of(types_BS, 1)
        return self.embeddings(self._inside(tokens_BS), own_Bs, self._local_pass(run, tokens_BS).draws, side, types_Bs)

    def _local_pass(self, run: Pass, tokens_BS: Tensor) -> Pass:
        """The pass as this rank's part of a sequence sees it: its draws are those of that part."""
        if run.draws is None or self.parts.count == 1:
            return run
        return replace(run, draws=run.draws.with_sequence(self.parts.own(tokens_BS.shape[1])))

    def _inside(self, x_BS: Tensor) -> Tensor:
        """This rank's part of a sequence inside of blocks: all of it, but for context parallel."""
        inside = self.parts.inside(x_BS.shape[1])
        return inside.of(x_BS, 1)

    def encode(self, inputs: ModelInputs, run: Pass) -> tuple[Tensor, Reports]:
        """The output of an encoder-decoder's encoder, [T, B, H], and what its routers have counted."""
        return self._encode(inputs, run, self._embed_source(inputs, run))

    def _encode(self, inputs: ModelInputs, run: Pass, x_tBH: Tensor | None) -> tuple[Tensor, Reports]:
        assert self.encoder is not None and inputs.encoder_tokens_BT is not None and x_tBH is not None
        tokens_BT, visible = inputs.encoder_tokens_BT, encoder_visibility(inputs.encoder_segments_BT)
        positions_BT = self._inside(counted_positions(tokens_BT))
        return self.encoder(x_tBH, self.encoder.inputs(visible, positions_BT, x_tBH, self._local_pass(run, tokens_BT)))

    def head_weight(self, rows: int) -> Tensor:
        """[rows, H]: this rank's rows of the head, without those that pad the vocabulary."""
        if self.head is not None:
            weight = self.head.weight
        else:
            assert self.embeddings is not None, "a model that ends with a tied head has the word embedding"
            weight = self.embeddings.word.weight
        # A slice of everything would still cost its backward pass a copy of the gradient.
        return weight if rows == weight.shape[0] else weight[:rows]

    def head_bias(self, rows: int) -> Tensor | None:
        """[rows]: what is added to the logits of these rows, where something is."""
        return None if self.mlm is None else self.mlm.bias[:rows]

    def logits(self, hidden_SBH: Tensor, inputs: ModelInputs | None = None) -> Tensor:
        """[B, S, V] in fp32, of a model that has the whole vocabulary; for labels, as `LabelHead` gives them."""
        if self.config.predicts_labels:
            assert inputs is not None, "where a sample is classified by follows from its padding"
            return self.label_head.logits(hidden_SBH, inputs)
        rows = self.config.vocabulary
        logits_BSV = (hidden_SBH.transpose(0, 1) @ self.head_weight(rows).T).float()
        bias_V = self.head_bias(rows)
        return logits_BSV if bias_V is None else logits_BSV + bias_V.float()

    def loss(
        self, hidden_SBH: Tensor, labels_BS: Tensor, objective: Objective, batch: Batch | None = None
    ) -> tuple[Tensor, Tensor]:
        """(scaled loss to call backward on, detached sum of the loss over this rank's part of the targets).

        In the evaluation of a head for labels the sum has the counts of `values/label_metrics.py` behind it, [1 + K];
        where the batch tells texts apart, what `text_sums` gives; with a teacher the divergence from it, [2].
        """
        if self.config.predicts_labels:
            assert batch is not None, "where ends are looked for follows from its padding"
            return self.label_head.loss(hidden_SBH, labels_BS, objective, batch)
        rows = objective.part.rows
        hidden_TH, labels_T = hidden_SBH.flatten(0, 1), self._inside(labels_BS).T.flatten()
        weight_VH, bias_V = self.head_weight(rows), self.head_bias(rows)
        if batch is not None and batch.num_texts:
            sums = text_sums(hidden_TH, Head(weight_VH, bias_V), labels_T, objective, batch)
            return sums[0], sums
        soft = None if batch is None else batch.soft
        return head_cross_entropy(hidden_TH, weight_VH, labels_T, objective, bias_V, soft)


def main_visibility(config: ModelConfig, inputs: ModelInputs) -> Visibility:
    """The visibility in the stack that the head stands on."""
    return Visibility(config.family != "encoder", inputs.segments_BS, inputs.segments_BS, inputs.prefix_B)


def encoder_visibility(segments_BT: Tensor | None) -> Visibility:
    """The visibility in an encoder-decoder's encoder."""
    return Visibility(False, segments_BT, segments_BT)


def counted_positions(tokens_BT: Tensor) -> Tensor:
    """0, 1, 2, ... for each sample."""
    return torch.arange(tokens_BT.shape[1], device=tokens_BT.device).expand(tokens_BT.shape)


def chosen_from(config: ModelConfig) -> VocabularyPart:
    """The whole of what the head chooses from: the vocabulary, or the labels."""
    return VocabularyPart(0, config.num_classes if config.predicts_labels else config.vocabulary)


def build_model(config: ModelConfig, recompute: Recompute = "none") -> Transformer:
    """The model on the meta device: names and shapes, no memory."""
    with torch.device("meta"):
        return Transformer(config, recompute)
