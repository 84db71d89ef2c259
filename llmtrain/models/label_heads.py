"""Heads that predict labels in place of tokens: of a sample, of each word, or where an answer begins and ends.

They are small and whole on every tensor rank, and stand outside of blocks: each rank does its own part of the sequence.
So losses and counts here are those of this rank's part. `SequenceParts.sum_over_block` makes them those of a block,
which every tensor rank has, as in all of the model.

Shape suffixes: B micro-batch, S sequence (s: this rank's part outside of blocks), H hidden, L labels, 2 ends.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmtrain.config.model import ModelConfig
from llmtrain.parallel.parts import HeldPositions, SequenceParts
from llmtrain.values.batch import PADDING


class Pooler(nn.Module):
    """A dense layer and tanh on the hidden state that a sample is classified by (Devlin et al. 2019)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x_SBH: Tensor) -> Tensor:
        return torch.tanh(self.dense(x_SBH))


def build_classifier(config: ModelConfig) -> nn.Linear | None:
    """The matrix of a classifier, of samples or of words."""
    if config.head not in ("classifier", "token_classifier"):
        return None
    bias = config.head == "token_classifier" or config.has_pooler
    return nn.Linear(config.hidden_size, config.num_classes, bias=bias)


def labelled_rows(hidden_sBH: Tensor, labels_sB: Tensor) -> tuple[Tensor, Tensor]:
    """([1, B, H], [1, B]): of each sample the hidden state that has a label, and that label.

    Without a wait of the host: where this rank has no label of a sample, it is the first state with a label that is
    none.
    """
    place_1B = (labels_sB >= 0).int().argmax(0, keepdim=True)
    index_1BH = place_1B[..., None].expand(-1, -1, hidden_sBH.shape[-1])
    return hidden_sBH.gather(0, index_1BH), labels_sB.gather(0, place_1B)


def classified_places(segments_BS: Tensor | None, tokens_BS: Tensor, family: str) -> Tensor:
    """[B]: where a sample is classified by: an encoder's first token, a decoder's last that is no padding."""
    if family == "encoder":
        return torch.zeros_like(tokens_BS[:, 0])
    if segments_BS is None:
        return torch.full_like(tokens_BS[:, 0], tokens_BS.shape[1] - 1)
    places_S = torch.arange(tokens_BS.shape[1], device=tokens_BS.device)
    return torch.where(segments_BS != PADDING, places_S, 0).amax(1)


@dataclass(frozen=True)
class Ends:
    """The first two labels of each sample: the positions where its answer begins and ends, negative without one.

    `visible_sB` is False on padding, which no end is looked for in.
    """

    labels_B2: Tensor
    visible_sB: Tensor | None
    parts: SequenceParts

    @property
    def valid_B2(self) -> Tensor:
        return self.labels_B2 >= 0

    def whole_logits(self, logits_sB2: Tensor) -> Tensor:
        """[S, B, 2] in fp32: of all positions, those of padding minus infinity. Gradients do not pass."""
        logits_sB2 = logits_sB2.detach().float()
        if self.visible_sB is not None:
            logits_sB2 = logits_sB2.masked_fill(~self.visible_sB[..., None], float("-inf"))
        return self.parts.gather(logits_sB2)


class EndsCrossEntropy(torch.autograd.Function):
    """-log softmax over the positions of a sample, at both ends of its answer; the gradient comes with the loss.

    Every rank has all logits and counts the ends that lie in its own part: the sum over the parts is the whole.
    """

    @staticmethod
    def forward(ctx: Any, logits_sB2: Tensor, ends: Ends, own: HeldPositions, scale: float) -> tuple[Tensor, Tensor]:
        log_SB2 = ends.whole_logits(logits_sB2).log_softmax(0)
        target_1B2, valid_B2 = ends.labels_B2.clamp(min=0)[None], ends.valid_B2
        places_s = own.places(logits_sB2.shape[0], logits_sB2.device)
        is_end_sB2 = (places_s[:, None, None] == target_1B2) & valid_B2
        loss_sum = -(own.of(log_SB2).masked_fill(~is_end_sB2, 0.0)).sum()
        grad_sB2 = (own.of(log_SB2).exp() * valid_B2 - is_end_sB2.float()) * scale
        ctx.save_for_backward(grad_sB2.to(logits_sB2.dtype))
        ctx.mark_non_differentiable(loss_sum)
        return loss_sum * scale, loss_sum

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        (grad_sB2,) = ctx.saved_tensors
        return grad_sB2 * grad_outputs[0], None, None, None


def best_spans(logits_SB2: Tensor, allowed_SB: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """([B], [B]): begin and end of the best answer whose end is not before its begin; only where it is allowed."""
    if allowed_SB is not None:
        logits_SB2 = logits_SB2.masked_fill(~allowed_SB[..., None], float("-inf"))
    begin_SB, where_SB = logits_SB2[..., 0].cummax(0)
    end_1B = (begin_SB + logits_SB2[..., 1]).argmax(0, keepdim=True)
    return where_SB.gather(0, end_1B)[0], end_1B[0]


def class_counts(best: Tensor, labels: Tensor, num_labels: int) -> Tensor:
    """[3 L]: by label how often it was right, predicted and meant, over what has a label."""
    valid = labels >= 0
    labels, best = labels.clamp(min=0), best.clamp(max=num_labels - 1)
    counts_3L = torch.zeros(3, num_labels, device=best.device)
    for row, (which, counted) in enumerate(((labels, valid & (best == labels)), (best, valid), (labels, valid))):
        counts_3L[row].scatter_add_(0, which.flatten(), counted.flatten().float())
    return counts_3L.flatten()


@dataclass(frozen=True)
class TagTable:
    """What the names of tags say: [L] the kind of entity, -1 outside of any, and whether the tag begins one."""

    kind_L: Tensor
    begins_L: Tensor

    @staticmethod
    def of(labels: tuple[str, ...], device: torch.device) -> "TagTable":
        """`B-PER` begins an entity PER, `I-PER` goes on with it, all others are outside."""
        kinds = [label[2:] if label[:2] in ("B-", "I-") else None for label in labels]
        numbers = {kind: number for number, kind in enumerate(dict.fromkeys(kind for kind in kinds if kind))}
        kind_L = torch.tensor([-1 if kind is None else numbers[kind] for kind in kinds], device=device)
        return TagTable(kind_L, torch.tensor([label.startswith("B-") for label in labels], device=device))


def entity_counts(best_SB: Tensor, labels_SB: Tensor, tags: TagTable) -> Tensor:
    """[3]: entities that were found exactly, entities that were found, entities that are there.

    Over the words, which are the positions with a label. An entity begins at `B-`, and at an `I-` behind another kind
    or none; it is right where kind, begin and end are (Sang and Buchholz 2000; as conlleval and seqeval count).
    """
    valid_SB = labels_SB >= 0
    places_SB = torch.arange(len(valid_SB), device=valid_SB.device)[:, None].expand_as(valid_SB)
    last_SB = torch.where(valid_SB, places_SB, -1).cummax(0).values
    before_SB = F.pad(last_SB[:-1], (0, 0, 1, 0), value=-1)  # the word before each position, -1 without one
    found = _entities(best_SB, valid_SB, before_SB, places_SB, tags)
    there = _entities(labels_SB.clamp(min=0), valid_SB, before_SB, places_SB, tags)
    same_SB = (found.kind_SB == there.kind_SB) & (found.first_SB == there.first_SB)
    right_SB = found.ends_SB & there.ends_SB & same_SB
    return torch.stack((right_SB.sum(), found.begins_SB.sum(), there.begins_SB.sum())).float()


@dataclass(frozen=True)
class _Entities:
    """By position: its kind, whether an entity begins or ends there, and where the one that it is in has begun."""

    kind_SB: Tensor
    begins_SB: Tensor
    ends_SB: Tensor
    first_SB: Tensor


def _entities(tags_SB: Tensor, valid_SB: Tensor, before_SB: Tensor, places_SB: Tensor, tags: TagTable) -> _Entities:
    kind_SB = torch.where(valid_SB, tags.kind_L[tags_SB], -1)
    kind_before_SB = torch.where(before_SB >= 0, kind_SB.gather(0, before_SB.clamp(min=0)), -1)
    begins_SB = (kind_SB >= 0) & valid_SB & (tags.begins_L[tags_SB] | (kind_SB != kind_before_SB))
    # A word ends its entity unless the next word goes on with it. `before` of the next word is this one.
    goes_on_SB = valid_SB & (kind_SB >= 0) & ~begins_SB
    is_continued_SB = torch.zeros_like(kind_SB).scatter_add_(0, before_SB.clamp(min=0), goes_on_SB.long()) > 0
    ends_SB = (kind_SB >= 0) & ~is_continued_SB
    return _Entities(kind_SB, begins_SB, ends_SB, torch.where(begins_SB, places_SB, -1).cummax(0).values)


def answer_counts(best_B: tuple[Tensor, Tensor], labels_B2: Tensor) -> Tensor:
    """[3]: answers that are exactly right, the sum of the answers' F1, answers.

    F1 is that of the positions: those of the answer beside those of the found one (Rajpurkar et al. 2016, 6.1, with
    positions in place of normalized words).
    """
    valid_B = (labels_B2 >= 0).all(1)
    begin_B, end_B = labels_B2.unbind(1)
    first_B, last_B = best_B
    shared_B = (torch.minimum(end_B, last_B) - torch.maximum(begin_B, first_B) + 1).clamp(min=0)
    f1_B = 2 * shared_B / ((end_B - begin_B + 1) + (last_B - first_B + 1))
    exact_B = (begin_B == first_B) & (end_B == last_B)
    return torch.stack([(count_B * valid_B).sum().float() for count_B in (exact_B, f1_B, torch.ones_like(f1_B))])
