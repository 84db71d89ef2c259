"""The part of the square of queries and keys that each kind of attention computes.

A pattern is symmetrical in query and key; causality comes on top of it (visibility.py). It is given twice, and tests
hold the two together: as a rule for single pairs, and as pieces: rectangles that cover everything that the rule allows,
none of it twice, so that work and memory follow the pattern.

s and t are positions of a query and a key in the sequence.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from llmtrain.config.attention import AttentionConfig, AttentionKind, required_size
from llmtrain.models.positions import sent
from llmtrain.values.keyed_hash import derived_key

Rule = Callable[[Tensor, Tensor], Tensor]
"""True where the query at s and the key at t may meet; both are whole numbers and broadcast."""

QUERY_BLOCK = 128


@dataclass(frozen=True)
class Extent:
    """The queries and keys of one call. The last query stands at the position of the last key; a cache has the rest."""

    num_queries: int
    num_keys: int
    looks_ahead: bool
    """True where keys behind a query's own position can be visible at all."""
    block: int = field(default_factory=lambda: QUERY_BLOCK)
    """Queries that are taken together."""

    @property
    def offset(self) -> int:
        """Position of the first query."""
        return self.num_keys - self.num_queries

    def blocks(self, block: int, cut_at: int = 0) -> Iterator[tuple[int, int]]:
        """First and last + 1 position of consecutive queries, cut at multiples of `block` and at `cut_at`."""
        edges = {self.offset, self.num_keys, *range(-(-self.offset // block) * block, self.num_keys, block)}
        if self.offset < cut_at < self.num_keys:
            edges.add(cut_at)
        yield from pairwise(sorted(edges))

    def piece(self, first: int, last: int, keys: tuple[int, int], rule: Rule | None = None) -> Iterator["Piece"]:
        """The queries first..last - 1 with a range of keys, cut to what there is."""
        start, stop = max(0, keys[0]), min(keys[1], self.num_keys if self.looks_ahead else last)
        if start < stop:
            yield Piece(slice(first - self.offset, last - self.offset), slice(start, stop), rule)


@dataclass(frozen=True)
class Piece:
    """A rectangle: indices of queries (not positions) and keys, and what the pattern leaves of it (None: all)."""

    queries: slice
    keys: slice
    rule: Rule | None = None


class Pattern(Protocol):
    """The pairs of query and key that a kind of attention allows."""

    def rule(self, num_positions: int, device: torch.device) -> Rule | None:
        """The definition, for positions below a number; None: every pair is allowed."""
        ...

    def pieces(self, extent: Extent) -> Iterator[Piece]:
        """Disjoint rectangles that, with their own rules and the order of positions, are exactly the allowed pairs."""
        ...


@dataclass(frozen=True)
class Full:
    """Every pair."""

    def rule(self, num_positions: int, device: torch.device) -> None:
        return None

    def pieces(self, extent: Extent) -> Iterator[Piece]:
        for first, last in extent.blocks(extent.block):
            yield from extent.piece(first, last, (0, extent.num_keys))


@dataclass(frozen=True)
class SlidingWindow:
    """|s - t| < window: the own position and window - 1 before it, and as many behind it where that may be seen."""

    window: int

    def near(self, s: Tensor, t: Tensor) -> Tensor:
        return (s - t).abs() < self.window

    def rule(self, num_positions: int, device: torch.device) -> Rule:
        return self.near

    def pieces(self, extent: Extent) -> Iterator[Piece]:
        for first, last in extent.blocks(extent.block):
            yield from extent.piece(first, last, (first - self.window + 1, last + self.window - 1), self.near)


@dataclass(frozen=True)
class Strided:
    """|s - t| < stride, or s - t a multiple of stride (Child et al. 2019, section 4.2, both patterns in one head)."""

    stride: int

    def near(self, s: Tensor, t: Tensor) -> Tensor:
        return (s - t).abs() < self.stride

    def either(self, s: Tensor, t: Tensor) -> Tensor:
        return self.near(s, t) | ((s - t) % self.stride == 0)

    def elsewhere(self, s: Tensor, t: Tensor) -> Tensor:
        return s != t

    def rule(self, num_positions: int, device: torch.device) -> Rule:
        return self.either

    def pieces(self, extent: Extent) -> Iterator[Piece]:
        """The near ones in blocks; then the positions of one remainder, among which only the own is near."""
        for first, last in extent.blocks(extent.block):
            yield from extent.piece(first, last, (first - self.stride + 1, last + self.stride - 1), self.near)
        # Queries of one remainder are a stride apart: `block` of them reach over `span` positions, and meet only keys
        # of the same remainder. So the piece is dense, though the positions are not.
        span = extent.block * self.stride
        for start in range(extent.offset, extent.num_keys, span):
            for first in range(start, min(start + self.stride, extent.num_keys)):
                last = min(start + span, extent.num_keys)
                queries = slice(first - extent.offset, last - extent.offset, self.stride)
                keys = slice(first % self.stride, extent.num_keys if extent.looks_ahead else last, self.stride)
                yield Piece(queries, keys, self.elsewhere)


@dataclass(frozen=True)
class Longformer:
    """|s - t| < window, or s or t among the first `num_global` positions (Beltagy et al. 2020, section 3.1)."""

    window: int
    num_global: int

    def near(self, s: Tensor, t: Tensor) -> Tensor:
        return (s - t).abs() < self.window

    def near_or_global(self, s: Tensor, t: Tensor) -> Tensor:
        return self.near(s, t) | (s < self.num_global) | (t < self.num_global)

    def rule(self, num_positions: int, device: torch.device) -> Rule:
        return self.near_or_global

    def pieces(self, extent: Extent) -> Iterator[Piece]:
        for first, last in extent.blocks(extent.block, cut_at=self.num_global):
            start = first - self.window + 1
            # Three kinds of rows: global queries see all; near the beginning window and global keys overlap, so they
            # are one piece with a rule; further on they are two, or the keys between them would be computed.
            if first < self.num_global:
                yield from extent.piece(first, last, (0, extent.num_keys))
            elif start <= self.num_global:
                yield from extent.piece(first, last, (0, last + self.window - 1), self.near_or_global)
            else:
                yield from extent.piece(first, last, (0, self.num_global))
                yield from extent.piece(first, last, (start, last + self.window - 1), self.near)


@dataclass(frozen=True)
class BigBird:
    """In blocks i and j of `block_size` positions: |i - j| <= 1, or one of them among the first `num_global`, or the
    earlier one among the `num_random` that the later one draws (Zaheer et al. 2020, section 2).

    A block draws from the blocks before it that it does not see anyway. What it draws depends on its number alone: not
    on the layer, the seed or the length of the sequence.
    """

    block_size: int
    num_global: int
    num_random: int

    def drawn(self, block: int) -> frozenset[int]:
        return drawn_blocks(block, self.num_global, self.num_random)

    def rule(self, num_positions: int, device: torch.device) -> Rule:
        table = sent(torch.from_numpy(block_table(self, -(-num_positions // self.block_size))), device)
        return lambda s, t: table[s // self.block_size, t // self.block_size]

    def pieces(self, extent: Extent) -> Iterator[Piece]:
        num_blocks = -(-extent.num_keys // self.block_size)
        seen = seen_blocks(self, num_blocks)
        for first, last in extent.blocks(self.block_size):
            block = first // self.block_size
            for start, stop in runs(j for j in seen[block] if extent.looks_ahead or j <= block):
                yield from extent.piece(first, last, (start * self.block_size, stop * self.block_size))


@cache
def drawn_blocks(block: int, num_global: int, num_random: int) -> frozenset[int]:
    """`num_random` of the blocks num_global..block - 2, or all of them: Floyd's sampling, with hashes as its draws."""
    candidates = max(0, block - 1 - num_global)
    drawn: set[int] = set()
    # Floyd: each draw is among one more candidate; one that is taken already gives way to the newest, which cannot be.
    for last in range(max(0, candidates - num_random), candidates):
        pick = derived_key("bigbird", block, last) % (last + 1)
        drawn.add(last if pick in drawn else pick)
    return frozenset(num_global + number for number in drawn)


@cache
def seen_blocks(pattern: BigBird, num_blocks: int) -> tuple[frozenset[int], ...]:
    """For each block those that it sees, later ones included."""
    seen: list[set[int]] = [
        set(range(num_blocks)) if i < pattern.num_global else {*range(min(pattern.num_global, num_blocks)), i}
        for i in range(num_blocks)
    ]
    for later in range(1, num_blocks):
        for earlier in (later - 1, *pattern.drawn(later)):
            seen[later].add(earlier)
            seen[earlier].add(later)
    return tuple(frozenset(blocks) for blocks in seen)


@cache
def block_table(pattern: BigBird, num_blocks: int) -> np.ndarray:
    """[num_blocks, num_blocks], True where one block sees the other. No tensor: one that is made while a graph is
    traced belongs to the trace, and must not be kept."""
    table = np.zeros((num_blocks, num_blocks), dtype=np.bool_)
    for block, others in enumerate(seen_blocks(pattern, num_blocks)):
        table[block, list(others)] = True
    return table


def runs(numbers: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Whole numbers as ranges of consecutive ones: first and last + 1."""
    start = stop = None
    for number in sorted(numbers):
        if number != stop:
            if start is not None and stop is not None:
                yield start, stop
            start = number
        stop = number + 1
    if start is not None and stop is not None:
        yield start, stop


PATTERNS: dict[AttentionKind, Callable[[AttentionConfig], Pattern]] = {
    "full": lambda config: Full(),
    "sliding_window": lambda config: SlidingWindow(required_size(config, "window")),
    "strided": lambda config: Strided(required_size(config, "stride")),
    "bigbird": lambda config: BigBird(config.block_size, config.num_global, config.num_random),
    "longformer": lambda config: Longformer(required_size(config, "window"), config.num_global),
    "linear": lambda config: Full(),
}
