"""The parts of the sequence and of the vocabulary that a rank holds, and the collectives that join them.

Shape suffixes: s this rank's part of the sequence, S the whole; C tokens of a chunk, V vocabulary, R ranks of a group.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class HeldPositions:
    """The positions of a sequence of `length` that a rank holds: runs of neighbours, in ascending order."""

    runs: tuple[range, ...]
    length: int

    @property
    def size(self) -> int:
        return sum(map(len, self.runs))

    def places(self, size: int, device: torch.device) -> Tensor:
        """[size] positions in the whole sequence."""
        assert size == self.size, (size, self)
        return torch.cat([torch.arange(run.start, run.stop, device=device) for run in self.runs])

    def of(self, whole: Tensor, dim: int = 0) -> Tensor:
        """These positions of a whole sequence, which lies along `dim`; a view where they are one run."""
        runs = [whole.narrow(dim, run.start, len(run)) for run in self.runs]
        return runs[0] if len(runs) == 1 else torch.cat(runs, dim)

    def part(self, place: int, count: int) -> "HeldPositions":
        """The `place`-th of `count` equal parts of what is held."""
        size, before, found = self.size // count, 0, []
        for run in self.runs:
            start, stop = max(0, place * size - before), min(len(run), (place + 1) * size - before)
            found += [run[start:stop]] if start < stop else []
            before += len(run)
        return HeldPositions(tuple(found), self.length)


def cut_sequence(length: int, place: int, count: int, balanced: bool) -> HeldPositions:
    """Part `place` of `count` equal ones: one run, or `balanced`, one from the beginning and one from the end.

    In causal attention late positions see more than early ones. A rank that holds the `place`-th run counted from
    either end has as much to compute as each of the others (Dubey et al. 2024, The Llama 3 Herd of Models, section
    3.3.2; Brandon et al. 2023, Striped Attention, have stripes for the same purpose).
    """
    size = length // count
    if not balanced:
        return HeldPositions((range(place * size, (place + 1) * size),), length)
    late = size // 2
    early = size - late
    first, last = range(place * early, (place + 1) * early), range(length - (place + 1) * late, length - place * late)
    if first.stop == last.start:
        return HeldPositions((range(first.start, last.stop),), length)
    return HeldPositions(tuple(run for run in (first, last) if run), length)


@dataclass(frozen=True)
class SequenceParts:
    """This rank's part: number `place` of `count` equal ones. `groups` hold the others, neighbours first.

    Inside of blocks, where tensor ranks hold the same, there are `blocks` parts: those of the context ranks. `balanced`
    is how these are cut.
    """

    place: int = 0
    count: int = 1
    groups: tuple[ProcessGroup, ...] = ()
    blocks: int = 1
    balanced: bool = False

    def inside(self, length: int) -> HeldPositions:
        """What this rank holds inside of a block, of a sequence of `length`."""
        return self._block(length, self.place // (self.count // self.blocks))

    def own(self, length: int) -> HeldPositions:
        """What this rank holds outside of blocks."""
        parts = self.count // self.blocks
        return self.inside(length).part(self.place % parts, parts)

    def gather(self, x_s: Tensor) -> Tensor:
        """The whole sequence, along the first dimension, from all parts. Gradients do not pass."""
        whole = x_s.detach()
        for group in self.groups:
            # Neighbours first: the parts of one group are side by side in what the next group joins.
            parts = whole.new_empty(whole.shape[0] * group.size(), *whole.shape[1:])
            dist.all_gather_into_tensor(parts, whole.contiguous(), group=group)
            whole = parts
        if not self.balanced:
            return whole
        length = whole.shape[0]
        blocks = [self._block(length, block) for block in range(self.blocks)]
        places = torch.cat([block.places(block.size, whole.device) for block in blocks])
        return torch.empty_like(whole).index_copy_(0, places, whole)

    def sum_over_block(self, own: Tensor) -> Tensor:
        """The sum of what ranks found in their parts of one block; they have one each where tensor ranks split it."""
        if self.count == self.blocks:
            return own
        total = own.detach().clone()
        dist.all_reduce(total, group=self.groups[0])  # the neighbours
        return total

    def _block(self, length: int, block: int) -> HeldPositions:
        return cut_sequence(length, block, self.blocks, self.balanced)


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

    def likeliest(self, logits_CV: Tensor) -> Tensor:
        """[C]: the id with the largest logit in the whole vocabulary, the lowest of equal ones."""
        if self.group is None:
            return logits_CV.argmax(-1)
        own_2C = torch.full((2, len(logits_CV)), float("-inf"), dtype=torch.float64, device=logits_CV.device)
        if self.rows:
            place_C = logits_CV.argmax(-1, keepdim=True)
            own_2C[0], own_2C[1] = logits_CV.gather(1, place_C)[:, 0], place_C[:, 0] + self.first
        parts = own_2C.new_empty(2 * self.group.size(), len(logits_CV))
        dist.all_gather_into_tensor(parts, own_2C, group=self.group)
        peaks_RC, ids_RC = parts.unflatten(0, (-1, 2)).unbind(1)
        return ids_RC.gather(0, peaks_RC.argmax(0, keepdim=True))[0].long()

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
