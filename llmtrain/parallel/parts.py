"""The parts of the sequence and of the vocabulary that a rank holds, and the collectives that join them.

Shape suffixes: s this rank's part of the sequence, S the whole; C tokens of a chunk, V vocabulary, R ranks of a group.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class SequenceParts:
    """This rank's part: number `place` of `count` equal ones. `groups` hold the others, neighbours first."""

    place: int = 0
    count: int = 1
    groups: tuple[ProcessGroup, ...] = ()

    def local_slice(self, length: int) -> slice:
        """The slice of this rank's part in a sequence of `length`."""
        size = length // self.count
        return slice(self.place * size, (self.place + 1) * size)

    def block_slice(self, length: int, size: int) -> slice:
        """The run of `size` that this rank's part lies in: what it holds inside of a block."""
        start = self.local_slice(length).start // size * size
        return slice(start, start + size)

    def gather(self, x_s: Tensor) -> Tensor:
        """The whole sequence, along the first dimension, from all parts. Gradients do not pass."""
        whole = x_s.detach()
        for group in self.groups:
            # Neighbours first: the parts of one group are side by side in what the next group joins.
            parts = whole.new_empty(whole.shape[0] * group.size(), *whole.shape[1:])
            dist.all_gather_into_tensor(parts, whole.contiguous(), group=group)
            whole = parts
        return whole


WHOLE = SequenceParts()
"""One rank holds everything."""


def makes_one_pass(logits_CV: Tensor) -> bool:
    """True where PyTorch's log-softmax reads logits of any type once and writes fp32 ones: on a GPU. On a CPU memory
    that is new costs more than passes over what is there."""
    return logits_CV.is_cuda


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

    def cross_entropy(
        self, logits_CV: Tensor, labels_C: Tensor, scale_C: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """(-log softmax(logits)[label], [C], and `scale_C` times its gradient by the logits), both in fp32.

        d loss / d logit = softmax - 1 at the label. The softmax is over the whole vocabulary; without `scale_C` there
        is no gradient. The logits may be overwritten.
        """
        if self.group is not None:
            return self._split_cross_entropy(logits_CV.float(), labels_C, scale_C, self.group)
        label_C1 = labels_C[:, None]
        if makes_one_pass(logits_CV):
            log_CV = torch.log_softmax(logits_CV, -1, dtype=torch.float32)
            loss_C = -log_CV.gather(1, label_C1)[:, 0]
            if scale_C is None:
                return loss_C, None
            return loss_C, log_CV.exp_().mul_(scale_C[:, None]).scatter_add_(1, label_C1, -scale_C[:, None])
        logits_CV = logits_CV.float()
        peak_C1, target_C1 = logits_CV.amax(-1, keepdim=True), logits_CV.gather(1, label_C1)
        sum_C1 = logits_CV.sub_(peak_C1).exp_().sum(-1, keepdim=True)
        loss_C = (peak_C1 + sum_C1.log() - target_C1)[:, 0]
        if scale_C is None:
            return loss_C, None
        # The logits are exponentials by now: over their sum they are the softmax.
        return loss_C, logits_CV.mul_(scale_C[:, None] / sum_C1).scatter_add_(1, label_C1, -scale_C[:, None])

    def _split_cross_entropy(
        self, logits_CV: Tensor, labels_C: Tensor, scale_C: Tensor | None, group: ProcessGroup
    ) -> tuple[Tensor, Tensor | None]:
        local_C = labels_C - self.first
        here_C = (local_C >= 0) & (local_C < self.rows)
        row_C = local_C.clamp(0, max(0, self.rows - 1))  # legal in either case
        peak_C = logits_CV.new_full((len(labels_C),), float("-inf"))
        target_C = torch.zeros_like(peak_C)
        if self.rows:
            peak_C = logits_CV.amax(-1)
            target_C = logits_CV.gather(1, row_C[:, None])[:, 0] * here_C  # the other ranks have 0
        sum_C = logits_CV.sub_(peak_C[:, None]).exp_().sum(-1)
        # One collective: sums that were made below peaks of their own are brought below the highest afterwards. All
        # ranks add the parts up in the same order, and have the same loss.
        own_3C = torch.stack((peak_C, sum_C, target_C))
        parts = own_3C.new_empty(3 * group.size(), len(labels_C))
        dist.all_gather_into_tensor(parts, own_3C, group=group)
        peaks_RC, sums_RC, targets_RC = parts.unflatten(0, (-1, 3)).unbind(1)
        highest_C = peaks_RC.amax(0)
        total_C = (sums_RC * (peaks_RC - highest_C).exp()).sum(0)
        loss_C = highest_C + total_C.log() - targets_RC.sum(0)
        if scale_C is None:
            return loss_C, None
        # The logits are exponentials by now: over the sum of all below the same peak they are the softmax.
        logits_CV.mul_((scale_C * (peak_C - highest_C).exp() / total_C)[:, None])
        if self.rows:
            logits_CV.scatter_add_(1, row_C[:, None], -(here_C * scale_C)[:, None])
        return loss_C, logits_CV
