"""The grid of weights in whole numbers."""

import pytest
import torch
from torch import Tensor

from llmtrain.values import quantization
from llmtrain.values.quantization import NumberGrid, Quantized, round_to_nearest, unless_rounded

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grid", GRIDS)
def test_what_lies_on_the_grid_already_stays(grid: NumberGrid, dtype: torch.dtype) -> None:
    """Whatever the largest number of a group is; and what does not is rounded."""
    random = torch.Generator().manual_seed(2)
    numbers = torch.randint(grid.lowest, grid.highest + 1, (60, 64), generator=random, dtype=torch.int8)
    numbers[:20] //= 3
    numbers[:2] = 0
    scales = torch.rand(60, grid.num_groups(64), generator=random).mul_(0.01).add_(1e-3).to(dtype)
    weight = Quantized(numbers, scales).dequantized()
    again = round_to_nearest(weight, grid, dtype)
    assert not torch.equal(again.dequantized(), weight)
    kept = unless_rounded(weight, again, grid)
    assert torch.equal(kept.dequantized(), weight) and kept.scale_OG.dtype == dtype
    mixed = torch.cat((weight, torch.randn(60, 64, generator=random)))
    rounded = round_to_nearest(mixed, grid, dtype)
    kept = unless_rounded(mixed, rounded, grid)
    assert torch.equal(kept.dequantized()[:60], weight)
    assert torch.equal(kept.dequantized()[60:], rounded.dequantized()[60:])
