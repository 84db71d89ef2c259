"""The part of a pattern that lies where some of the queries meet some of the keys: the geometry of attention in blocks.

A rank of a ring has a part of the queries, and meets the keys part by part. Positions are always those in the whole
sequence, and where they lie in the tensors at hand follows from the runs that these hold.
"""

from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

from llmtrain.models.attention.patterns import Extent, Pattern, Piece
from llmtrain.parallel.parts import HeldPositions, cut_sequence


class Tile(NamedTuple):
    """A piece of the whole that is at hand, and where its queries and keys lie in the tensors at hand."""

    piece: Piece
    rows: slice
    columns: slice


def tiles(pattern: Pattern, extent: Extent, queries: HeldPositions, keys: HeldPositions) -> Iterator[Tile]:
    """What the pattern's pieces leave of these queries and keys; both are numbered as in the whole."""
    for piece in pattern.pieces(extent):
        columns = [found for found in overlaps(piece.keys, keys) if found]
        for query_part, rows in overlaps(piece.queries, queries) if columns else ():
            for key_part, places in columns:
                yield Tile(Piece(query_part, key_part, piece.rule), rows, places)


def overlaps(wanted: slice, held: HeldPositions) -> Iterator[tuple[slice, slice]]:
    """(positions in the whole, their places among what is held) for each run that has some of the wanted ones."""
    step, before = wanted.step or 1, 0
    for run in held.runs:
        first = max(wanted.start, run.start)
        first += (wanted.start - first) % step
        last = min(wanted.stop, run.stop)
        if first < last:
            yield slice(first, last, step), slice(before + first - run.start, before + last - run.start, step)
        before += len(run)


class Rectangle(NamedTuple):
    """Queries and keys at hand that all meet, or `is_causal`, each query those keys that are not behind it."""

    rows: slice
    columns: slice
    is_causal: bool


def rectangles(queries: HeldPositions, keys: HeldPositions, causal: bool) -> list[Rectangle]:
    """What full attention without documents, padding and prefixes leaves of these queries and keys.

    Under an order the two are the same positions, or have none in common.
    """
    everything = Rectangle(slice(0, queries.size), slice(0, keys.size), False)
    if not causal:
        return [everything]
    if queries == keys:
        return [everything._replace(is_causal=True)]
    found: list[Rectangle] = []
    before = 0
    for run in queries.runs:
        # Keys are in ascending order: those before a run of queries are the first ones.
        seen = sum(len(other) for other in keys.runs if other.stop <= run.start)
        if found and found[-1].columns.stop == seen:
            found[-1] = found[-1]._replace(rows=slice(found[-1].rows.start, before + len(run)))
        elif seen:
            found.append(Rectangle(slice(before, before + len(run)), slice(0, seen), False))
        before += len(run)
    return found


@cache
def needed_moves(pattern: Pattern, extent: Extent, ranks: int, balanced: bool) -> int:
    """How often blocks of keys move on in a ring until no rank needs another: less than once around for a window."""
    queries = [cut_sequence(extent.num_queries, rank, ranks, balanced) for rank in range(ranks)]
    keys = [cut_sequence(extent.num_keys, rank, ranks, balanced) for rank in range(ranks)]
    for moves in range(ranks - 1, 0, -1):
        met = ((queries[rank], keys[(rank - moves) % ranks]) for rank in range(ranks))
        if any(True for held in met for _ in tiles(pattern, extent, *held)):
            return moves
    return 0
