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

    def log_sum_and_target(self, logits_CV: Tensor, labels_C: Tensor) -> tuple[Tensor, Tensor]:
        """log(sum(exp)) over the whole vocabulary, and the logit of each label; [C] each, fp32."""
        if self.group is None:
            return logits_CV.logsumexp(-1), logits_CV.gather(1, labels_C[:, None])[:, 0]
        peak_C = logits_CV.new_full((len(labels_C),), float("-inf"))
        if self.rows:
            peak_C = logits_CV.amax(-1)
        dist.all_reduce(peak_C, dist.ReduceOp.MAX, self.group)
        local_C, here_C = self.local(labels_C)
        target_C = torch.zeros_like(peak_C)
        if self.rows:
            target_C = logits_CV.gather(1, local_C[:, None])[:, 0] * here_C
        sums_2C = torch.stack(((logits_CV - peak_C[:, None]).exp().sum(-1), target_C))
        dist.all_reduce(sums_2C, group=self.group)
        return peak_C + sums_2C[0].log(), sums_2C[1]

    def local(self, labels_C: Tensor) -> tuple[Tensor, Tensor]:
        """(row on this rank, whether the label is on this rank); the row is legal in either case."""
        local_C = labels_C - self.first
        here_C = (local_C >= 0) & (local_C < self.rows)
        return local_C.clamp(0, max(0, self.rows - 1)), here_C
