"""The parts of the sequence and of the vocabulary that a rank holds, and the collectives that join them.

Shape suffixes: s this rank's part of the sequence, S the whole; C tokens of a chunk, V vocabulary.
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
            # The peak of the whole row, before any exponential: sums of parts with other peaks would not add up.
            dist.all_reduce(peak_C, dist.ReduceOp.MAX, self.group)
        sum_C = logits_CV.sub_(peak_C[:, None]).exp_().sum(-1)
        if self.group is not None:
            sums_2C = torch.stack((sum_C, target_C))
            dist.all_reduce(sums_2C, group=self.group)  # one rank has the label's logit, the others add 0
            sum_C, target_C = sums_2C.unbind()
        return sum_C, peak_C + sum_C.log(), target_C

    def local(self, labels_C: Tensor) -> tuple[Tensor, Tensor]:
        """(row on this rank, whether the label is on this rank); the row is legal in either case."""
        local_C = labels_C - self.first
        here_C = (local_C >= 0) & (local_C < self.rows)
        return local_C.clamp(0, max(0, self.rows - 1)), here_C
