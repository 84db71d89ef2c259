"""Which source each sample of a mixture is of: arithmetic over few pieces, however long the run is.

A mixture has the same weights for a while: a piece. A new one begins where the schedule says other weights, and where a
source has given all that it may: the others go on in the shares that they have. Within a piece the sources take turns
in a fixed periodic order, so that how many samples of each lie before a sample is known without walking there.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import gcd
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmtrain.config.data import LONGEST_PERIOD
from llmtrain.errors import DataError

MOST_TURNS = 10_000_000
"""Most sources and turns in the periods of all pieces together: they are counted once when a mixture is laid out."""


class MixtureSchedule:
    """A fixed periodic schedule: in every period of sum(weights) samples, source i has weights[i] of them.

    The j-th sample of source i stands at time (j + 1/2) / weights[i] of the period, so that sources are spread evenly.
    """

    def __init__(self, weights: Sequence[int]) -> None:
        """A weight may be 0, but not all."""
        divisor = gcd(*weights)
        self._weights = [weight // divisor for weight in weights]
        if sum(self._weights) > LONGEST_PERIOD:
            raise DataError(
                f"the weights {', '.join(map(str, weights))} of the sources: their sum must be at most "
                f"{LONGEST_PERIOD:,} after division by their common divisor. Give shares such as 70 and 30."
            )
        # Correctly rounded divisions: equal fractions are equal floats, and ties go to the earlier source.
        times = np.concatenate([(np.arange(weight) + 0.5) / max(1, weight) for weight in self._weights])
        sources = np.repeat(np.arange(len(self._weights)), self._weights)
        turns = np.concatenate([np.arange(weight) for weight in self._weights])
        order = np.argsort(times, kind="stable")
        self._order = sources[order]
        self._sources, self._turns = self._order.tolist(), turns[order].tolist()
        # Where the turns of each source stand in the period, one source behind the other.
        self._positions = np.argsort(self._order, kind="stable")
        self._begins = np.concatenate(([0], np.cumsum(self._weights))).tolist()

    @property
    def period(self) -> int:
        """The samples after which the order repeats."""
        return len(self._sources)

    def source_of(self, number: int) -> tuple[int, int]:
        """The source of global sample `number`, and the sample's number within that source."""
        period, position = divmod(number, len(self._sources))
        source = self._sources[position]
        return source, period * self._weights[source] + self._turns[position]

    def number_of(self, source: int, number_in_source: int) -> int:
        """The global number of a source's sample: the inverse of `source_of`."""
        period, turn = divmod(number_in_source, self._weights[source])
        return period * len(self._sources) + int(self._positions[self._begins[source] + turn])

    def counts(self, number: int) -> NDArray[np.int64]:
        """[sources], how many samples of each lie before global sample `number`."""
        period, position = divmod(number, len(self._sources))
        begun = np.bincount(self._order[:position], minlength=len(self._weights))
        return period * np.asarray(self._weights, np.int64) + begun


class Phase(NamedTuple):
    """The weights of the sources from a sample on."""

    first_sample: int
    weights: tuple[int, ...]


class Exhausted(NamedTuple):
    """A source that has given all that it may: from sample `first_sample` on the mixture goes without it."""

    source: int
    first_sample: int


@dataclass(frozen=True)
class _Piece:
    """Samples from `first` on with these weights, and the samples of each source before them."""

    first: int
    weights: tuple[int, ...]
    before: tuple[int, ...]


class Mixture:
    """The sources of all samples: phases of weights, cut where a source has given as many samples as it may."""

    def __init__(self, phases: Sequence[Phase], limits: Sequence[int | None]) -> None:
        """`phases` begin at ascending samples, the first at 0; `limits` are samples of each source, None for no limit.

        Raises DataError where it would take too long to lay them out.
        """
        self.exhausted: list[Exhausted] = []
        self.end: int | None = None
        """The first sample that no source is left for; None where there is no such."""
        self._limits = limits
        self._pieces: list[_Piece] = []
        self._laid_out = 0
        before = (0,) * len(limits)
        for number, phase in enumerate(phases):
            end = phases[number + 1].first_sample if number + 1 < len(phases) else None
            before = self._add_phase(phase, end, before)
            if self.end is not None:
                break
        self._firsts = [piece.first for piece in self._pieces]
        self._is_plain = len(limits) == 1  # whatever its weights, a source alone has all samples
        # Neighbouring samples share their piece; two, because a boundary may lie between them.
        self._schedule = lru_cache(maxsize=2)(self._build_schedule)

    def source_of(self, number: int) -> tuple[int, int]:
        """The source of sample `number`, and the sample's number within that source.

        Raises DataError where all sources have given what they may.
        """
        if self.end is not None and number >= self.end:
            raise DataError(
                f"sample {number:,}: all sources have given as much as their max_epochs, max_samples and max_tokens "
                f"allow, {self.end:,} samples in all. Raise one of them, or end the run before."
            )
        if self._is_plain:
            return 0, number
        at = bisect_right(self._firsts, number) - 1
        piece = self._pieces[at]
        source, turn = self._schedule(at).source_of(number - piece.first)
        return source, piece.before[source] + turn

    def counts(self, number: int) -> list[int]:
        """How many samples of each source lie before sample `number`."""
        number = number if self.end is None else min(number, self.end)
        if not self._pieces:
            return [0] * len(self._limits)
        at = bisect_right(self._firsts, number) - 1
        piece = self._pieces[at]
        passed = self._schedule(at).counts(number - piece.first).tolist()
        return [before + more for before, more in zip(piece.before, passed, strict=True)]

    def number_of(self, source: int, number_in_source: int) -> int:
        """The number of a source's sample, one that the mixture holds: the inverse of `source_of`."""
        before = [piece.before[source] for piece in self._pieces]
        at = bisect_right(before, number_in_source) - 1
        piece = self._pieces[at]
        return piece.first + self._schedule(at).number_of(source, number_in_source - piece.before[source])

    def _build_schedule(self, at: int) -> MixtureSchedule:
        return MixtureSchedule(self._pieces[at].weights)

    def _add_phase(self, phase: Phase, end: int | None, before: tuple[int, ...]) -> tuple[int, ...]:
        """Add the pieces of a phase that ends before sample `end`; returns the counts of the sources there."""
        first: int | None = phase.first_sample
        while first is not None and first != end:
            left = [limit is None or count < limit for limit, count in zip(self._limits, before, strict=True)]
            weights = tuple(weight if more else 0 for weight, more in zip(phase.weights, left, strict=True))
            if not any(weights):
                self.end = first
                break
            self._pieces.append(_Piece(first, weights, before))
            schedule = self._counted(weights)
            behind, gone = end, None
            for source, limit in enumerate(self._limits):
                if limit is not None and weights[source]:
                    last = first + schedule.number_of(source, limit - before[source] - 1)
                    if behind is None or last + 1 <= behind:
                        behind, gone = last + 1, source
            if behind is not None:
                passed = schedule.counts(behind - first).tolist()
                before = tuple(count + more for count, more in zip(before, passed, strict=True))
            if behind is not None and gone is not None:
                self.exhausted.append(Exhausted(gone, behind))
            first = behind  # None: it has no end
        return before

    def _counted(self, weights: Sequence[int]) -> MixtureSchedule:
        schedule = MixtureSchedule(weights)
        self._laid_out += len(weights) + schedule.period
        if self._laid_out > MOST_TURNS:
            raise DataError(
                f"data.train: a mixture of {len(weights):,} sources that changes so often, where data.schedule says so "
                "or a source has given all that it may, takes too long to lay out. Give fewer sources a limit, or "
                "smaller weights."
            )
        return schedule
