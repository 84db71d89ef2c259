"""The grid of weights in whole numbers."""

import pytest
import torch
from torch import Tensor

from llmtrain.values import quantization
from llmtrain.values.quantization import NumberGrid, round_to_nearest

GRIDS = [NumberGrid(4, 8), NumberGrid(4), NumberGrid(8, 16), NumberGrid(8)]


def moved_by_last_bits(grid: NumberGrid) -> Tensor:
    """How many numbers change where weights change in their last bit, one way and the other."""
    weight = torch.randn(200, 64, generator=torch.Generator().manual_seed(0)).mul_(0.02)
    numbers = round_to_nearest(weight, grid).numbers_OI
    moved = [torch.nextafter(weight, weight.sign() * torch.inf), torch.nextafter(weight, torch.zeros(()))]
    return torch.stack([(round_to_nearest(each, grid).numbers_OI != numbers).sum() for each in moved]).sum()


@pytest.mark.parametrize("grid", GRIDS)
def test_last_bits_of_weights_change_no_number(grid: NumberGrid) -> None:
    """As layouts differ in them. All 12,800 weights are somewhere between two edges."""
    assert moved_by_last_bits(grid) == 0


@pytest.mark.parametrize("grid", GRIDS)
def test_with_the_largest_weight_at_an_edge_they_do(grid: NumberGrid, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantization, "BEYOND", 1.0)
    assert moved_by_last_bits(grid) > 0


@pytest.mark.parametrize("grid", GRIDS)
def test_the_largest_weight_is_at_the_end_of_the_grid_on_either_side(grid: NumberGrid) -> None:
    weight = torch.randn(200, 64, generator=torch.Generator().manual_seed(1))
    made = round_to_nearest(weight, grid)
    by_group = weight.unflatten(1, (grid.num_groups(64), -1))
    at = by_group.abs().argmax(-1, keepdim=True)
    numbers = made.numbers_OI.unflatten(1, (grid.num_groups(64), -1)).gather(-1, at)
    assert torch.equal(numbers, grid.highest * by_group.gather(-1, at).sign().to(torch.int8))
    assert (made.dequantized() - weight).abs().max() <= made.scale_OG.max() * 0.501
