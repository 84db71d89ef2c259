"""Samples of whole documents: best fit inside the documents of one shard, so that only long ones are cut.

The documents of a shard, each with its end of sequence, are cut into pieces where they are longer than a sample, and
the pieces are put into samples of seq_len + 1 tokens by best fit, the longest first (Ding et al. 2024, section 3: Fewer
Truncations Improve Language Modeling; the rule is that of Johnson 1974). What is left over in a sample is padding. How
many samples a shard makes, and of which lengths each is put together, follows from the lengths alone. Which of several
pieces of one length goes where, and their order in a sample, are drawn anew in every epoch.

Where each document is to be a sample of its own, or none may be cut, the rule says so; then documents that are too long
are dropped or lose their end.

A document of m tokens longer than a sample is cut as a stream is cut into windows: piece k begins at token k * seq_len,
and its last token is the first of the next, so that every token but the document's first is a target once.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from llmtrain.config.data import TooLong
from llmtrain.data.bijection import keyed_permutation
from llmtrain.data.order import ShardSpan
from llmtrain.values.keyed_hash import wide_key

Counts = NDArray[np.int64]


@dataclass(frozen=True)
class PackingRule:
    """What a sample is put together of: as many documents as fit best, or one; and what is done with longer ones."""

    kind: Literal["best_fit", "single"] = "best_fit"
    too_long: TooLong = "cut"


BEST_FIT = PackingRule()


@dataclass(frozen=True)
class ShardPacking:
    """The samples that a shard makes, how many documents are cut for them, the tokens of padding in them, and how many
    documents are too long and in none. `longest` is the longest document's number of tokens."""

    samples: int
    cut_documents: int
    padding: int
    dropped_documents: int = 0
    longest: int = 0


@dataclass(frozen=True)
class PackingPlan:
    """The pieces of a shard, and the samples that pieces of their lengths go to: the same in every epoch.

    `begins_P` and `sizes_P` are places in the shard's stream, in its order. `samples_P` are those of the pieces sorted
    by length, the longest first.
    """

    begins_P: Counts
    sizes_P: Counts
    samples_P: Counts
    summary: ShardPacking

    @staticmethod
    def of(lengths: Counts, seq_len: int, rule: PackingRule = BEST_FIT) -> "PackingPlan":
        """The plan of a shard whose documents have so many tokens, ends of sequence left out."""
        long, room = int((lengths > seq_len).sum()), seq_len + 1
        begins_P, sizes_P = _pieces(lengths, seq_len) if rule.too_long == "cut" else _whole(lengths, seq_len, rule)
        if rule.kind == "single":
            samples_P = np.arange(len(sizes_P))
        else:
            sizes, counts = np.unique(sizes_P, return_counts=True)
            samples_P = _best_fit(sizes[::-1].tolist(), counts[::-1].tolist(), room)
        samples = int(samples_P.max()) + 1 if len(samples_P) else 0
        kept = rule.too_long in ("cut", "truncate")
        padding = samples * room - int(sizes_P.sum())
        longest = int(lengths.max(initial=0)) if rule != BEST_FIT else 0
        summary = ShardPacking(samples, long if kept else 0, padding, 0 if kept else long, longest)
        return PackingPlan(begins_P, sizes_P, samples_P, summary)


@dataclass(frozen=True)
class PackedShard:
    """The samples of one shard in one epoch: sample i has the pieces bounds[i] to bounds[i + 1]."""

    shard: int
    begins: list[int]
    ends: list[int]
    bounds: list[int]

    def pieces(self, sample: int) -> tuple[list[int], list[int]]:
        """Where the pieces of a sample begin and end in the stream of the shard, in their order."""
        pieces = slice(self.bounds[sample], self.bounds[sample + 1])
        return self.begins[pieces], self.ends[pieces]

    def parts(self, sample: int) -> list[ShardSpan]:
        """The same as spans."""
        return [ShardSpan(self.shard, *piece) for piece in zip(*self.pieces(sample), strict=True)]


def packed_shard(plan: PackingPlan, seed: int, source: int, epoch: int, shard: int) -> PackedShard:
    """The samples of a shard in an epoch."""
    num_pieces = len(plan.sizes_P)
    drawn = keyed_permutation(num_pieces, wide_key("packing", seed, source, epoch, shard))
    # Pieces of one length in the drawn order; the longest lengths first, as the samples were filled.
    by_length = drawn[np.argsort(-plan.sizes_P[drawn], kind="stable")]
    sample_of = np.empty(num_pieces, np.int64)
    sample_of[by_length] = plan.samples_P
    order = drawn[np.argsort(sample_of[drawn], kind="stable")]
    begins = plan.begins_P[order]
    bounds = np.concatenate(([0], np.cumsum(np.bincount(sample_of, minlength=plan.summary.samples))))
    return PackedShard(shard, begins.tolist(), (begins + plan.sizes_P[order]).tolist(), bounds.tolist())


def _whole(lengths: Counts, seq_len: int, rule: PackingRule) -> tuple[Counts, Counts]:
    """Begins and sizes of all documents that are in a sample; of a longer one its begin, or nothing."""
    whole = lengths + 1  # with the end of sequence
    begins_P, sizes_P = np.cumsum(whole) - whole, np.minimum(whole, seq_len + 1)
    kept = np.ones(len(whole), bool) if rule.too_long == "truncate" else whole <= seq_len + 1
    return begins_P[kept], sizes_P[kept]


def _pieces(lengths: Counts, seq_len: int) -> tuple[Counts, Counts]:
    """Begins and sizes of all pieces in the stream of a shard."""
    whole = lengths + 1  # with the end of sequence
    counts = np.maximum(1, -(-(whole - 1) // seq_len))
    document_P = np.repeat(np.arange(len(lengths)), counts)
    number_P = np.arange(len(document_P)) - np.repeat(np.cumsum(counts) - counts, counts)
    begins_P = (np.cumsum(whole) - whole)[document_P] + number_P * seq_len
    sizes_P = np.minimum(seq_len + 1, whole[document_P] - number_P * seq_len)
    return begins_P, sizes_P


def _best_fit(sizes: Sequence[int], counts: Sequence[int], room: int) -> Counts:
    """The sample of every piece, pieces sorted by falling `sizes`, of which there are `counts` each.

    Each goes into the sample in which the least room is left behind it, a new one where it fits none. Where that is one
    with room for several pieces of the size, it gets all of them: none is fuller. So pieces are placed by the hundred.
    """
    free: dict[int, list[int]] = {}  # samples by the room that they have
    rooms: list[int] = []  # the keys of `free`, sorted
    placed: list[int] = []
    opened = 0
    for size, count in zip(sizes, counts, strict=True):
        while count:
            at = bisect_left(rooms, size)
            here = rooms[at] if at < len(rooms) else room
            each = here // size
            if at < len(rooms):
                held = free[here]
                used = min(len(held), max(1, count // each))
                samples = held[-used:]
                del held[-used:]
                if not held:
                    del free[here], rooms[at]
            else:
                used = max(1, count // each)
                samples = list(range(opened, opened + used))
                opened += used
            taken = min(count, used * each)  # fewer where the last pieces do not fill a sample
            placed += [sample for sample in samples for _ in range(each)][:taken]
            count -= taken
            left = here - (each if taken == used * each else taken) * size
            if left:
                if left not in free:
                    insort(rooms, left)
                    free[left] = []
                free[left] += samples
    return np.array(placed, np.int64)
