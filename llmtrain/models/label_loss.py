"""The loss and the logits of a head for labels, and in an evaluation what its metrics are counted from.

Shape suffixes: B micro-batch, S sequence (s: this rank's part outside of blocks), H hidden, L labels, K counts.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmtrain.config.model import ModelConfig
from llmtrain.models.compiled_graphs import dropped
from llmtrain.models.head import Objective, head_cross_entropy
from llmtrain.models.label_heads import (
    Ends,
    EndsCrossEntropy,
    Pooler,
    TagTable,
    answer_counts,
    best_spans,
    class_counts,
    classified_places,
    entity_counts,
    labelled_rows,
)
from llmtrain.parallel.parts import SequenceParts
from llmtrain.parallel.stateless_random import Draws, site_key
from llmtrain.values.batch import PADDING, ModelInputs
from llmtrain.values.label_metrics import has_entities

DROPOUT_SITE = site_key("label_head")

Losses = tuple[Tensor, Tensor, Tensor]
"""The scaled loss to call backward on; of this rank's part of the sequence the sum of the loss, and the counts [K]."""


@dataclass(frozen=True)
class LabelHead:
    """A model's modules for labels, on a rank that holds these parts of the sequence."""

    config: ModelConfig
    parts: SequenceParts
    pooler: Pooler | None
    classifier: nn.Linear | None
    span: nn.Linear | None

    def loss(
        self, hidden_sBH: Tensor, labels_BS: Tensor, objective: Objective, inputs: ModelInputs
    ) -> tuple[Tensor, Tensor]:
        """As `Transformer.loss`: of the block of the sequence that all tensor ranks share."""
        if self.span is not None:
            scaled, loss_sum, counts_K = self._ends_loss(hidden_sBH, labels_BS, objective, inputs)
        else:
            scaled, loss_sum, counts_K = self._class_loss(hidden_sBH, labels_BS, objective)
        sums = loss_sum if torch.is_grad_enabled() else torch.cat((loss_sum[None], counts_K))
        return scaled, self.parts.sum_over_block(sums)

    def logits(self, hidden_SBH: Tensor, inputs: ModelInputs) -> Tensor:
        """In fp32, of the whole sequence on one rank: [B, L] of samples, [B, S, L] of tokens, [B, S, 2] of ends."""
        if self.span is not None:
            return self.span(hidden_SBH).transpose(0, 1).float()
        assert self.classifier is not None
        if self.config.head == "token_classifier":
            return self.classifier(hidden_SBH).transpose(0, 1).float()
        place_B = classified_places(inputs.segments_BS, inputs.tokens_BS, self.config.family)
        index_1BH = place_B[None, :, None].expand(-1, -1, hidden_SBH.shape[-1])
        return self.classifier(self._pooled(hidden_SBH.gather(0, index_1BH)))[0].float()

    def _pooled(self, x_1BH: Tensor) -> Tensor:
        return x_1BH if self.pooler is None else self.pooler(x_1BH)

    def _dropped(self, x_SBH: Tensor, draws: Draws | None) -> Tensor:
        return dropped(x_SBH, self.config.label_dropout, DROPOUT_SITE, draws)

    def _class_loss(self, hidden_sBH: Tensor, labels_BS: Tensor, objective: Objective) -> Losses:
        assert self.classifier is not None
        own, draws = self.parts.own(labels_BS.shape[1]), objective.draws
        labels_sB = own.of(labels_BS, 1).T
        if self.config.head == "classifier":
            # Draws of the one row, wherever it lies: that no rank's part of the sequence changes them.
            row_1BH, labels_sB = labelled_rows(hidden_sBH, labels_sB)
            x_sBH = self._dropped(self._pooled(row_1BH), draws)
        else:
            split = draws is not None and self.parts.count > 1
            x_sBH = self._dropped(hidden_sBH, draws.with_sequence(own) if split and draws is not None else draws)
        weight_LH, bias_L = self.classifier.weight, self.classifier.bias
        losses = head_cross_entropy(x_sBH.flatten(0, 1), weight_LH, labels_sB.flatten(), objective, bias_L)
        if torch.is_grad_enabled():
            return *losses, losses[1].new_zeros(0)
        best_sB = F.linear(x_sBH, weight_LH, bias_L).argmax(-1)
        counts_K = class_counts(best_sB, labels_sB, self.config.num_classes)
        if has_entities(self.config):
            tags = TagTable.of(self.config.labels or (), labels_BS.device)
            entities_3 = entity_counts(self.parts.gather(best_sB), labels_BS.T, tags)
            counts_K = torch.cat((counts_K, self._counted_once(entities_3)))
        return *losses, counts_K

    def _ends_loss(self, hidden_sBH: Tensor, labels_BS: Tensor, objective: Objective, inputs: ModelInputs) -> Losses:
        assert self.span is not None
        own = self.parts.own(labels_BS.shape[1])
        visible_SB = None if inputs.segments_BS is None else inputs.segments_BS.T != PADDING
        visible_sB = None if visible_SB is None else own.of(visible_SB)
        ends = Ends(labels_BS[:, :2], visible_sB, self.parts)
        logits_sB2 = self.span(hidden_sBH)
        losses = EndsCrossEntropy.apply(logits_sB2, ends, own, objective.scale)
        if torch.is_grad_enabled():
            return *losses, losses[1].new_zeros(0)
        # Answers lie in the second text, where token types say which that is.
        context_SB = None if inputs.token_types_BS is None else inputs.token_types_BS.T == 1
        counts_3 = answer_counts(best_spans(ends.whole_logits(logits_sB2), context_SB), ends.labels_B2)
        return *losses, self._counted_once(counts_3)

    def _counted_once(self, counts_K: Tensor) -> Tensor:
        """What every rank of the sequence has found, as the part of one of them."""
        return counts_K if self.parts.place == 0 else torch.zeros_like(counts_K)
