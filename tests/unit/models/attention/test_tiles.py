"""The geometry of attention in blocks: what the ranks of a ring compute is the whole, once, in equal shares."""

from itertools import product

import pytest
import torch

from llmtrain.config.attention import ATTENTION_KINDS, AttentionConfig
from llmtrain.models.attention.patterns import PATTERNS, Extent, Full, SlidingWindow
from llmtrain.models.attention.tiles import needed_moves, rectangles, tiles
from llmtrain.parallel.parts import cut_sequence
from tests.unit.models.attention.dense_attention import KINDS, LENGTH, SOFTMAX_KINDS, pattern_mask


def met(kind: str, causal: bool, ranks: int, balanced: bool) -> torch.Tensor:
    """[S, T]: how often a query meets a key on any rank in any turn of the ring."""
    config = AttentionConfig(**KINDS[kind])
    pattern, extent = PATTERNS[config.kind](config), Extent(LENGTH, LENGTH, not causal, block=8)
    moves = needed_moves(pattern, extent, ranks, balanced)
    found = torch.zeros(LENGTH, LENGTH, dtype=torch.long)
    for rank, move in product(range(ranks), range(moves + 1)):
        queries = cut_sequence(LENGTH, rank, ranks, balanced)
        keys = cut_sequence(LENGTH, (rank - move) % ranks, ranks, balanced)
        places_s, places_t = (held.places(held.size, torch.device("cpu")) for held in (queries, keys))
        for piece, rows, columns in tiles(pattern, extent, queries, keys):
            s, t = torch.arange(LENGTH)[piece.queries], torch.arange(LENGTH)[piece.keys]
            assert torch.equal(places_s[rows], s) and torch.equal(places_t[columns], t)
            allowed = torch.ones(len(s), len(t), dtype=torch.bool) if piece.rule is None else piece.rule(s[:, None], t)
            found[s[:, None], t] += allowed & ((t <= s[:, None]) if causal else True)
    return found


@pytest.mark.parametrize(("ranks", "balanced"), [(2, True), (4, True), (4, False), (5, True)])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kind", SOFTMAX_KINDS)
def test_ranks_compute_the_pattern_once(kind: str, causal: bool, ranks: int, balanced: bool) -> None:
    expected = pattern_mask(AttentionConfig(**KINDS[kind]), LENGTH, LENGTH)
    expected = expected.tril() if causal else expected
    assert torch.equal(met(kind, causal, ranks, balanced), expected.long())


@pytest.mark.parametrize(("ranks", "balanced"), [(2, True), (4, True), (4, False), (5, True), (8, True)])
@pytest.mark.parametrize("causal", [True, False])
def test_rectangles_are_full_attention(causal: bool, ranks: int, balanced: bool) -> None:
    found = torch.zeros(LENGTH, LENGTH, dtype=torch.long)
    cuts = [cut_sequence(LENGTH, rank, ranks, balanced) for rank in range(ranks)]
    for queries, keys in product(cuts, cuts):
        s, t = (held.places(held.size, torch.device("cpu")) for held in (queries, keys))
        parts = rectangles(queries, keys, causal)
        assert len(parts) <= 1
        for rows, columns, is_causal in parts:
            square = torch.ones(len(s[rows]), len(t[columns]), dtype=torch.long)
            found[s[rows][:, None], t[columns]] += square.tril() if is_causal else square
    assert torch.equal(found, torch.ones_like(found).tril() if causal else torch.ones_like(found))


def pairs(ranks: int, balanced: bool, length: int) -> list[list[int]]:
    """Pairs of query and key that each rank computes in each turn of the ring, causal."""
    cuts = [cut_sequence(length, rank, ranks, balanced) for rank in range(ranks)]

    def computed(rank: int, move: int) -> int:
        parts = rectangles(cuts[rank], cuts[(rank - move) % ranks], causal=True)
        sizes = [(rows.stop - rows.start, columns.stop - columns.start, causal) for rows, columns, causal in parts]
        return sum(s * (s + 1) // 2 if causal else s * t for s, t, causal in sizes)

    return [[computed(rank, move) for rank in range(ranks)] for move in range(ranks)]


@pytest.mark.parametrize("ranks", [2, 4, 8, 16])
def test_a_balanced_cut_is_equal_work_in_every_turn(ranks: int) -> None:
    """A turn takes as long as its busiest rank: cut in order, 2c - 1 half blocks for c, balanced c."""
    part = 64
    balanced, in_order = (pairs(ranks, cut, part * ranks) for cut in (True, False))
    assert all(len(set(turn)) == 1 for turn in balanced)
    assert sum(map(sum, balanced)) == sum(map(sum, in_order)) == part * ranks * (part * ranks + 1) // 2
    half = part * part // 2
    assert sum(map(max, balanced)) == pytest.approx(ranks * half, rel=0.01)
    assert sum(map(max, in_order)) == pytest.approx((2 * ranks - 1) * half, rel=0.02)


def test_blocks_move_as_far_as_the_pattern_reaches() -> None:
    causal, both = (Extent(512, 512, looks_ahead, block=64) for looks_ahead in (False, True))
    assert needed_moves(Full(), causal, 4, balanced=False) == needed_moves(Full(), both, 4, balanced=True) == 3
    window = SlidingWindow(100)  # parts are 128
    assert needed_moves(window, causal, 4, balanced=False) == 1
    assert needed_moves(window, both, 4, balanced=False) == 3  # the next rank's block comes last
    assert needed_moves(SlidingWindow(200), causal, 4, balanced=False) == 2
    assert needed_moves(Full(), causal, 1, balanced=True) == 0


def test_kinds_that_widen_are_those_whose_last_query_has_much_more_to_see_than_the_middle_one() -> None:
    for kind in SOFTMAX_KINDS:
        seen = pattern_mask(AttentionConfig(**KINDS[kind]), LENGTH, LENGTH).tril().sum(1)
        assert (seen[-1] > 1.3 * seen[LENGTH // 2]) == ATTENTION_KINDS[kind].widens, kind
