"""The order of samples: a pure function from a sample's number to its place, found without a list of all samples.

Shards are permuted anew in every epoch; inside each group of consecutive permuted shards, windows are shuffled by a
keyed bijection. So reading stays within a few shards at a time, and any position is found at once.

There are two orders. In SampleOrder each window lies in one shard. In ContinuousOrder windows cross the ends of shards,
so that no token is left out: in every epoch the shards of a source stand one behind another in a keyed order, and epoch
follows epoch, one stream without end. Window v is the seq_len + 1 tokens of it from v * seq_len on, so each token is a
target once in each epoch; only the very first token of the first one has nothing before it. Sample n is window n,
shuffled among the windows that begin in the same group of shards.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from llmtrain.data.bijection import KeyedBijection, keyed_permutation
from llmtrain.values.keyed_hash import wide_key


class Place(NamedTuple):
    """The place of a sample: window `window` of shard `shard`, in pass `epoch` over the source."""

    epoch: int
    shard: int
    window: int


class ShardSpan(NamedTuple):
    """Tokens [begin, end) of the stream of shard `shard`."""

    shard: int
    begin: int
    end: int


@dataclass(frozen=True)
class _EpochWindows:
    """The shards of one epoch in their order, and how many windows lie before each of them."""

    shards: list[int]
    windows_before: list[int]


class SampleOrder:
    """The order of the windows of one source that each lie in one shard, whose last tokens may be in none.

    Sample n belongs to epoch n // N, where N is the number of windows.
    """

    def __init__(self, windows: Sequence[int], seq_len: int, seed: int, source: int, group_size: int) -> None:
        """`windows` counts the windows of each shard; they are shuffled within groups of `group_size` shards."""
        self.num_windows = self.whole_windows = sum(windows)
        assert self.num_windows > 0
        self._seq_len = seq_len
        self._windows = np.asarray(windows, np.int64)
        self._seed = seed
        self._source = source
        self._group_size = group_size
        # Neighbouring samples share their epoch and group; two of each, because a boundary may lie between them.
        self._epoch = lru_cache(maxsize=2)(self._build_epoch)
        self._bijection = lru_cache(maxsize=2)(self._build_bijection)

    def place(self, number: int) -> Place:
        """The place of sample `number` (from 0, without end)."""
        epoch, position = divmod(number, self.num_windows)
        order = self._epoch(epoch)
        before = order.windows_before
        # The last shard that begins at or before the position: shards without windows are passed over.
        group = (bisect_right(before, position) - 1) // self._group_size
        begin = before[group * self._group_size]
        end = before[min((group + 1) * self._group_size, len(order.shards))]
        shuffled = begin + self._bijection(epoch, group, end - begin)(position - begin)
        rank = bisect_right(before, shuffled) - 1
        return Place(epoch, order.shards[rank], shuffled - before[rank])

    def parts(self, place: Place) -> list[ShardSpan]:
        """The tokens of a sample: of one shard, `seq_len` and one that the next window begins with."""
        begin = place.window * self._seq_len
        return [ShardSpan(place.shard, begin, begin + self._seq_len + 1)]

    def coming_shards(self, number: int) -> tuple[list[int], int]:
        """The shards of the group that follows, and the sample from which on the answer is another one.

        There are none in the first half of a group: who reads a few samples only needs none of them.
        """
        epoch, position = divmod(number, self.num_windows)
        order = self._epoch(epoch)
        before, size = order.windows_before, self._group_size
        first = (bisect_right(before, position) - 1) // size * size
        begin, end = before[first], before[min(first + size, len(order.shards))]
        middle = (begin + end) // 2
        if position < middle:
            return [], epoch * self.num_windows + middle
        if end < self.num_windows:
            following = order.shards[first + size : first + 2 * size]
        else:
            following = self._epoch(epoch + 1).shards[:size]
        return [shard for shard in following if self._windows[shard]], epoch * self.num_windows + end

    def windows_of(self, shard: int) -> int:
        """How many samples of an epoch need a shard."""
        return int(self._windows[shard])

    def most_shards(self) -> int:
        """How many shards one window needs."""
        return 1

    def _build_epoch(self, epoch: int) -> _EpochWindows:
        shards = keyed_permutation(len(self._windows), wide_key("shards", self._seed, self._source, epoch))
        before = np.concatenate(([0], np.cumsum(self._windows[shards])))
        return _EpochWindows(shards.tolist(), before.tolist())

    def _build_bijection(self, epoch: int, group: int, size: int) -> KeyedBijection:
        return KeyedBijection(size, wide_key("windows", self._seed, self._source, epoch, group))


@dataclass(frozen=True)
class _EpochStream:
    """The shards of one epoch in their order, where each stands in it, and where each begins in the endless stream.

    `begins` has the end of the epoch as its last element.
    """

    shards: list[int]
    ranks: list[int]
    begins: list[int]


@dataclass(frozen=True)
class _Group:
    """Windows [first, end) begin in group `number` of an epoch's shards; the last reaches into the next group."""

    number: int
    first: int
    end: int


class ContinuousOrder:
    """The order of the windows of one source. Sample n belongs to the epoch that its window begins in.

    Numbers of four kinds meet here. Samples n and windows v count from 0 over all epochs, tokens from the begin of the
    endless stream. A rank is a shard's place in one epoch's order, a shard is its number in the manifest.
    """

    def __init__(self, lengths: Sequence[int], seq_len: int, seed: int, source: int, group_size: int) -> None:
        """`lengths` counts the tokens of each shard's stream; windows are shuffled in groups of `group_size` shards."""
        self._epoch_tokens = sum(lengths)
        assert self._epoch_tokens > seq_len
        self.num_windows = self._epoch_tokens // seq_len
        """Windows of one epoch, rounded down: epochs need not end where windows do."""
        self.whole_windows = (self._epoch_tokens - 1) // seq_len
        """The first samples, which hold tokens of the first epoch alone: all that begin in it but the last, if that
        one reaches into the next."""
        self._lengths = np.asarray(lengths, np.int64)
        self._seq_len = seq_len
        self._seed = seed
        self._source = source
        self._group_size = group_size
        # Neighbouring samples share their epoch and group; two of each, because a boundary may lie between them.
        self._epoch = lru_cache(maxsize=2)(self._build_epoch)
        self._bijection = lru_cache(maxsize=2)(self._build_bijection)
        self._last: tuple[int, _EpochStream, _Group] | None = None

    def place(self, number: int) -> Place:
        """The place of sample `number` (from 0, without end): which of the windows that begin in a shard it is."""
        number_of_epoch, order, group = self._locate(number)
        window = number
        if number < group.end - 1:  # the last stays last, so that what it needs of the next group is needed late
            bijection = self._bijection(number_of_epoch, group.number, group.end - 1 - group.first)
            window = group.first + bijection(number - group.first)
        rank = bisect_right(order.begins, window * self._seq_len) - 1
        return Place(number_of_epoch, order.shards[rank], window - self._first_window(order.begins[rank]))

    def parts(self, place: Place) -> list[ShardSpan]:
        """The tokens of a sample, in their order: a window may hold the end of one shard and others whole."""
        epoch, order = place.epoch, self._epoch(place.epoch)
        rank = order.ranks[place.shard]
        begin = order.begins[rank]
        position = (self._first_window(begin) + place.window) * self._seq_len - begin
        parts, missing = [], self._seq_len + 1
        while True:
            shard = order.shards[rank]
            end = min(position + missing, int(self._lengths[shard]))
            if end > position:
                parts.append(ShardSpan(shard, position, end))
                missing -= end - position
            if not missing:
                return parts
            position, rank = 0, rank + 1
            if rank == len(order.shards):
                epoch, rank = epoch + 1, 0
                order = self._epoch(epoch)

    def coming_shards(self, number: int) -> tuple[list[int], int]:
        """The shards of the group that follows, and the sample from which on the answer is another one.

        There are none in the first half of a group: who reads a few samples only needs none of them.
        """
        number_of_epoch, order, group = self._locate(number)
        middle = (group.first + group.end) // 2
        if number < middle:
            return [], middle
        size = self._group_size
        following = order.shards[(group.number + 1) * size : (group.number + 2) * size]
        following = following or self._epoch(number_of_epoch + 1).shards[:size]
        return [shard for shard in following if self._lengths[shard]], group.end

    def windows_of(self, shard: int) -> int:
        """How many samples of an epoch need a shard, at most."""
        return min(-(-int(self._lengths[shard]) // self._seq_len) + 1, self.num_windows)

    def most_shards(self) -> int:
        """How many shards one window needs, at most."""
        lengths = np.sort(self._lengths[self._lengths > 0])
        return min(int(np.searchsorted(np.cumsum(lengths), self._seq_len + 1)) + 2, len(lengths))

    def _first_window(self, token: int) -> int:
        """The first window that begins at a token of the endless stream or behind it."""
        return -(-token // self._seq_len)

    def _locate(self, number: int) -> tuple[int, _EpochStream, _Group]:
        """The epoch of a sample, and the group of shards that its window begins in."""
        last = self._last
        if last is None or not last[-1].first <= number < last[-1].end:  # neighbouring samples mostly share it
            self._last = last = self._located(number)
        return last

    def _located(self, number: int) -> tuple[int, _EpochStream, _Group]:
        number_of_epoch = number * self._seq_len // self._epoch_tokens
        order = self._epoch(number_of_epoch)
        # The last shard that begins at the window's begin or before it: shards without tokens are passed over.
        group = (bisect_right(order.begins, number * self._seq_len) - 1) // self._group_size
        bounds = (group * self._group_size, min((group + 1) * self._group_size, len(order.shards)))
        first, end = (self._first_window(order.begins[rank]) for rank in bounds)
        return number_of_epoch, order, _Group(group, first, end)

    def _build_epoch(self, epoch: int) -> _EpochStream:
        shards = keyed_permutation(len(self._lengths), wide_key("shards", self._seed, self._source, epoch))
        # Python's integers: the endless stream may grow beyond 64 bits.
        begins = epoch * self._epoch_tokens + np.concatenate(([0], np.cumsum(self._lengths[shards]))).astype(object)
        return _EpochStream(shards.tolist(), np.argsort(shards).tolist(), begins.tolist())

    def _build_bijection(self, epoch: int, group: int, size: int) -> KeyedBijection:
        return KeyedBijection(size, wide_key("windows", self._seed, self._source, epoch, group))
