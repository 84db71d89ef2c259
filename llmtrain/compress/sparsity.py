"""Which weights are pruned: decided element by element from global places, so that every layout prunes the same ones.

Shape suffixes: N elements of a part of a matrix, U matrices, G groups of four.
"""

from collections.abc import Callable, Iterator
from math import prod

import torch
from torch import Tensor

from llmtrain.values.fragment import Box

PLACE_BITS = 32
"""Of a key; what lies farther on begins again at 0, and would only matter between equal magnitudes."""

DIGIT_BITS, TOP_SHIFT = 8, 56
"""Keys have 63 bits: eight digits, the first of them at this place."""

GROUP, KEPT = 4, 2
"""2:4: so many neighbours, and how many of them stay."""

Parts = Callable[[], Iterator[tuple[int, Tensor]]]
"""The keys that a rank is the one to count, in parts, each with the number of its matrix; asked for several times."""


def global_places(shape: tuple[int, ...], box: Box, span: tuple[int, int], device: torch.device) -> Tensor:
    """[N]: the flat places in a tensor of `shape` of the elements [start, stop) of a flattened box of it."""
    left_N = torch.arange(*span, device=device)
    places_N = torch.zeros_like(left_N)
    for dim in reversed(range(len(shape))):
        places_N += (left_N % box.shape[dim] + box.offsets[dim]) * prod(shape[dim + 1 :])
        left_N = left_N // box.shape[dim]
    return places_N


def magnitude_bits(weights: Tensor) -> Tensor:
    """Whole numbers in the order of the magnitudes of fp32 numbers: their bits without the sign."""
    return weights.detach().float().abs().view(torch.int32).long()


def magnitude_keys(weights_N: Tensor, places_N: Tensor) -> Tensor:
    """Whole numbers in the order of the magnitudes, of equal ones in that of their places: each once in a matrix."""
    return magnitude_bits(weights_N) << PLACE_BITS | places_N & ((1 << PLACE_BITS) - 1)


def key_of_rank(parts: Parts, counts_U: Tensor, add_up: Callable[[Tensor], object]) -> Tensor:
    """[U]: of each matrix the key of its `counts`-th smallest; -1 where that is 0.

    Digit by digit, from histograms that `add_up` sums over all ranks in place: what travels is small, and no rank sees
    more than its own keys.
    """
    left_U, prefix_U = counts_U.clone(), torch.zeros_like(counts_U)
    for shift in range(TOP_SHIFT, -1, -DIGIT_BITS):
        histogram_UD = torch.zeros(len(counts_U), 1 << DIGIT_BITS, dtype=torch.long, device=counts_U.device)
        for number, keys_N in parts():
            inside = keys_N if shift == TOP_SHIFT else keys_N[keys_N >> (shift + DIGIT_BITS) == prefix_U[number]]
            digits = inside >> shift & ((1 << DIGIT_BITS) - 1)
            histogram_UD[number] += torch.bincount(digits, minlength=1 << DIGIT_BITS)
        add_up(histogram_UD)
        up_to_UD = histogram_UD.cumsum(1)
        digit_U = (up_to_UD < left_U[:, None]).sum(1)
        before_UD = torch.nn.functional.pad(up_to_UD, (1, 0))
        left_U -= before_UD.gather(1, digit_U[:, None])[:, 0]
        prefix_U = prefix_U << DIGIT_BITS | digit_U
    return torch.where(counts_U > 0, prefix_U, -1)


def pruned_of_four(bits_G4: Tensor) -> Tensor:
    """[G, 4]: True for the two smallest magnitudes of each group; of equal ones the first stay."""
    keys_G4 = bits_G4 * GROUP + torch.arange(GROUP - 1, -1, -1, device=bits_G4.device)
    kept_G2 = keys_G4.topk(KEPT, dim=-1).indices
    return torch.ones_like(keys_G4, dtype=torch.bool).scatter_(1, kept_G2, False)
