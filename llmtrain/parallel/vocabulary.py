"""The part of the vocabulary that a rank holds, and the sums that a softmax over all parts needs."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class VocabularyPart:
    """Rows [first, first + rows) of the head are on this rank; `group` holds the other parts (None: there are none).

    Rows that pad the vocabulary are left out of `rows`, which may be 0.
    """

    first: int
    rows: int
    group: ProcessGroup | None = None

    @staticmethod
    def of_rank(padded_size: int, vocab_size: int, group: ProcessGroup) -> "VocabularyPart":
        """An equal part of the padded vocabulary, without its padding."""
        held = padded_size // group.size()
        first = group.rank() * held
        return VocabularyPart(first, min(held, max(0, vocab_size - first)), group)

    def exponentials(self, logits_CV: Tensor, labels_C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Turns logits into exp(logit - peak) in place; returns their sum, log(sum(exp(logit))) and the labels' logits.

        [C] each, fp32. The peak and the sums are over the whole vocabulary. Dividing by the sum makes probabilities,
        which spares a second exponential.
        """
        row_C, here_C = self.local(labels_C)
        peak_C = logits_CV.new_full((len(labels_C),), float("-inf"))
        target_C = torch.zeros_like(peak_C)
        if self.rows:
            peak_C = logits_CV.amax(-1)
            target_C = logits_CV.gather(1, row_C[:, None])[:, 0] * here_C
        if self.group is not None:
            dist.all_reduce(peak_C, dist.ReduceOp.MAX, self.group)
        sum_C = logits_CV.sub_(peak_C[:, None]).exp_().sum(-1)
        if self.group is not None:
            sums_2C = torch.stack((sum_C, target_C))
            dist.all_reduce(sums_2C, group=self.group)
            sum_C, target_C = sums_2C.unbind()
        return sum_C, peak_C + sum_C.log(), target_C

    def local(self, labels_C: Tensor) -> tuple[Tensor, Tensor]:
        """(row on this rank, whether the label is on this rank); the row is legal in either case."""
        local_C = labels_C - self.first
        here_C = (local_C >= 0) & (local_C < self.rows)
        return local_C.clamp(0, max(0, self.rows - 1)), here_C
