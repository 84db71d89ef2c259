"""Parts of the sequence: every position is on one rank, outside of blocks and inside; gathering puts them in order."""

from typing import Any

import pytest
import torch
from torch import Tensor

from llmtrain.parallel import parts
from llmtrain.parallel.layout import Coordinates, Layout
from llmtrain.parallel.parts import HeldPositions, SequenceParts, cut_sequence

LENGTHS = (24, 60, 36)


def of_rank(layout: Layout, context: int, tensor: int, balanced: bool) -> SequenceParts:
    """As `Groups.sequence_parts` has it, without groups."""
    place = Coordinates(tensor, context, 0, 0)
    number = place.context * layout.tensor + place.tensor if layout.sequence else place.context
    return SequenceParts(number, layout.sequence_parts, (), layout.context, balanced)


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize(("context", "tensor"), [(1, 1), (1, 3), (2, 1), (3, 2), (4, 3), (2, 6), (12, 1)])
def test_every_position_is_held_once(context: int, tensor: int, balanced: bool) -> None:
    layout = Layout(tensor=tensor, context=context, sequence=tensor > 1)
    for length in LENGTHS:
        if length % (context * tensor):
            continue
        everything = torch.arange(length)
        held = []
        for block in range(context):
            ranks = [of_rank(layout, block, number, balanced) for number in range(tensor)]
            inside = ranks[0].inside(length)
            assert all(rank.inside(length) == inside for rank in ranks)
            own = [rank.own(length).of(everything) for rank in ranks]
            assert {len(part) for part in own} == {length // (context * tensor)}
            assert torch.equal(torch.cat(own), inside.of(everything))
            held.append(inside.of(everything))
        assert torch.equal(torch.cat(held).sort().values, everything)
        assert all(bool((part.diff() > 0).all()) for part in held)


def test_a_balanced_part_has_a_run_from_either_end() -> None:
    runs = [cut_sequence(24, rank, 3, balanced=True).runs for rank in range(3)]
    assert runs == [(range(4), range(20, 24)), (range(4, 8), range(16, 20)), (range(8, 16),)]
    # Parts that two do not divide have one more at the beginning.
    assert cut_sequence(10, 0, 2, balanced=True).runs == (range(3), range(8, 10))
    assert cut_sequence(2, 1, 2, balanced=True).runs == (range(1, 2),)


def test_places_and_slices_are_the_same_positions() -> None:
    held = HeldPositions((range(2, 5), range(9, 10)), 12)
    x = torch.randn(2, 12, 3)
    assert torch.equal(held.of(x, 1), x[:, held.places(4, x.device)])
    assert held.part(1, 2).runs == (range(4, 5), range(9, 10))
    view = cut_sequence(12, 1, 3, balanced=False).of(x, 1)
    assert view.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()


@pytest.mark.parametrize("balanced", [False, True])
def test_gathered_parts_are_in_the_order_of_the_sequence(balanced: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tensor ranks in each of two context ranks; a gather joins neighbours first."""
    layout = Layout(tensor=2, context=2, sequence=True)
    whole = torch.randn(12, 2)
    own = {(c, t): of_rank(layout, c, t, balanced).own(12).of(whole) for c in range(2) for t in range(2)}
    tensor_ranks, context_ranks = ([own[0, 0], own[0, 1]], [torch.cat((own[c, 0], own[c, 1])) for c in range(2)])

    class Group:
        def __init__(self, held: list[Tensor]) -> None:
            self.held = held

        def size(self) -> int:
            return len(self.held)

    def gather(into: Tensor, mine: Tensor, group: Any) -> None:
        assert torch.equal(mine, group.held[0])
        into.copy_(torch.cat(group.held))

    monkeypatch.setattr(parts.dist, "all_gather_into_tensor", gather)
    groups: Any = (Group(tensor_ranks), Group(context_ranks))
    rank = SequenceParts(0, 4, groups, 2, balanced)
    assert torch.equal(rank.gather(own[0, 0]), whole)
