"""Random numbers that depend on where they are used and not on who draws them.

A draw is a hash of a key (seed, step, micro-batch, layer, site) and of the element's index in the whole, unsharded
tensor. So every layout, a recomputed forward pass and a resumed run draw the same numbers, and there is no generator
state to save.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from llmtrain.values.keyed_hash import FIRST_FACTOR, SECOND_FACTOR, derived_key, signed

_FIRST, _SECOND = signed(FIRST_FACTOR), signed(SECOND_FACTOR)


def site_key(*parts: int | str) -> Tensor:
    """The key of a place in the model that draws, as a 0-dim int64 tensor on the CPU.

    A layer is compiled once for all layers: a number of its own would be a part of the graph, and every layer has
    another. It is no buffer, so that it keeps its value where a model is built without memory.
    """
    return torch.tensor(derived_key(*parts), device="cpu")


def mixed(x: Tensor) -> Tensor:
    """The output of SplitMix64 on int64: products wrap, masks make shifts logical."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * _FIRST
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * _SECOND
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


@dataclass(frozen=True)
class Span:
    """The part of one dimension that is at hand: from `start`, every `step`-th, of `length` in all."""

    start: int
    length: int
    step: int = 1

    def places(self, size: int, device: torch.device) -> Tensor:
        """[size] places in the whole dimension."""
        return torch.arange(self.start, self.start + size * self.step, self.step, device=device)


class Places(Protocol):
    """The part of one dimension that is at hand, be it a Span or not."""

    @property
    def length(self) -> int: ...

    def places(self, size: int, device: torch.device) -> Tensor: ...


@dataclass(frozen=True)
class Draws:
    """The source of one micro-batch's draws.

    `key` is a 0-dim int64 tensor, so that a compiled layer is not compiled again for every step. `sequence` says which
    part of the sequence this rank's activations hold; None: all of it. A `site` is a `site_key`.
    """

    key: Tensor
    sequence: Places | None = None

    @staticmethod
    def of_micro_batch(seed: int, step: int, micro_batch: int, device: torch.device) -> "Draws":
        """Draws of micro-batch number `micro_batch` of step `step`, both counted over the whole run and all ranks."""
        # Filled on the device: a copy from the host would be waited for.
        return Draws(torch.full((), derived_key(seed, "draws", step, micro_batch), device=device))

    def with_sequence(self, sequence: Places) -> "Draws":
        return replace(self, sequence=sequence)

    def keep_mask(
        self, site: Tensor | int, probability: float, shape: Sequence[int], spans: Sequence[Places]
    ) -> Tensor:
        """True where an element is kept. `spans` places each dimension of `shape` in the whole tensor."""
        return self.bits(site, shape, spans) >= int(probability * 2**32)

    def uniform(self, site: Tensor | int, shape: Sequence[int], spans: Sequence[Places]) -> Tensor:
        """Numbers in [0, 1), in fp32."""
        return (self.bits(site, shape, spans) >> 8).float() * 2**-24

    def bits(self, site: Tensor | int, shape: Sequence[int], spans: Sequence[Places]) -> Tensor:
        """32 random bits per element, as int64."""
        # Mixed before the index comes in as well: keys of neighbouring layers, and indices, are neighbours themselves.
        key = mixed(self.key + site)
        index = torch.zeros((), dtype=torch.int64, device=self.key.device)
        stride = 1
        for dim in reversed(range(len(shape))):
            place = spans[dim].places(shape[dim], self.key.device)
            index = index + (place * stride).view(-1, *[1] * (len(shape) - 1 - dim))
            stride *= spans[dim].length  # of the whole tensor: the index is the same whoever holds the element
        return (mixed(key ^ index) >> 32) & 0xFFFFFFFF


def dropout_hidden(
    x_SBH: Tensor, probability: float, site: Tensor | int, draws: Draws, columns: Span | None = None
) -> Tensor:
    """Dropout on activations whose sequence may be split over ranks, and where `columns` says so, their width."""
    spans: list[Places] = [Span(0, size) for size in x_SBH.shape]
    if columns is not None:
        spans[-1] = columns
    if draws.sequence is not None:
        spans[0] = draws.sequence
    keep = draws.keep_mask(site, probability, x_SBH.shape, spans)
    return torch.where(keep, x_SBH * (1 / (1 - probability)), 0.0)
