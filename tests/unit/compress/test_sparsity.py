"""Which weights are pruned, whatever parts a matrix lies in."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from llmtrain.compress.sparsity import global_places, key_of_rank, magnitude_bits, magnitude_keys, pruned_of_four
from llmtrain.values.fragment import Box

CPU = torch.device("cpu")


def drawn(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ordered(weights: Tensor) -> Tensor:
    """The places of a matrix, smallest magnitude first, of equal ones the first place."""
    return weights.abs().flatten().sort(stable=True).indices


@pytest.mark.parametrize("count", [0, 1, 100, 383, 384])
def test_the_smallest_are_found_and_no_more(count: int) -> None:
    weights = drawn((16, 24)).to(torch.bfloat16).float()  # many are equal
    keys = magnitude_keys(weights.flatten(), torch.arange(384))
    limit = key_of_rank(lambda: iter([(0, keys)]), torch.tensor([count]), lambda counts: None)
    assert set((keys <= limit).nonzero().flatten().tolist()) == set(ordered(weights)[:count].tolist())


def test_the_parts_of_a_matrix_do_not_matter() -> None:
    """Two ranks have halves of two matrices, one by columns, and see only each other's histograms."""
    whole = [drawn((8, 12), 1), drawn((8, 12), 2)]
    boxes = [Box((0, 0), (8, 6)), Box((0, 6), (8, 6))]
    counts = torch.tensor([40, 7])

    def keys_of(rank: int) -> Iterator[tuple[int, Tensor]]:
        for number, weights in enumerate(whole):
            part = weights[boxes[rank].slices_in(Box.whole((8, 12)))].flatten()
            places = global_places((8, 12), boxes[rank], (0, 48), CPU)
            for half in (slice(0, 20), slice(20, 48)):
                yield number, magnitude_keys(part[half], places[half])

    both = key_of_rank(lambda: iter([*keys_of(0), *keys_of(1)]), counts, lambda counts: None)
    assert both.shape == (2,)
    for number, weights in enumerate(whole):
        keys = magnitude_keys(weights.flatten(), torch.arange(96))
        assert set((keys <= both[number]).nonzero().flatten().tolist()) == set(
            ordered(weights)[: counts[number]].tolist()
        )


def test_places_are_those_of_the_whole_tensor() -> None:
    places = torch.arange(2 * 6 * 10).view(2, 6, 10)
    box = Box((1, 2, 5), (1, 3, 4))
    expected = places[box.slices_in(Box.whole((2, 6, 10)))].flatten()[3:11]
    assert torch.equal(global_places((2, 6, 10), box, (3, 11), CPU), expected)


def test_bits_are_in_the_order_of_magnitudes() -> None:
    weights = torch.cat((drawn((50,)), torch.tensor([0.0, -0.0, 1e-42, -3e38])))
    assert torch.equal(magnitude_bits(weights).sort().values, magnitude_bits(weights.abs().sort().values))
    assert magnitude_bits(torch.tensor([-0.0])).item() == 0


def test_two_of_four_go_and_of_equals_the_first_stay() -> None:
    groups = torch.tensor([[4.0, -1.0, 3.0, 0.5], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 2.0], [-5.0, 6.0, -7.0, 8.0]])
    expected = [[False, True, False, True], [False, False, True, True], [False, True, True, False]]
    assert pruned_of_four(magnitude_bits(groups)).tolist() == [*expected, [True, True, False, False]]
