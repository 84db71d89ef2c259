"""Which source a sample is of: counted one by one, and computed."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.data.mixture import Exhausted, Mixture, MixtureSchedule, Phase
from llmtrain.errors import DataError


@st.composite
def mixtures(draw: st.DrawFn) -> tuple[list[Phase], list[int | None]]:
    sources = draw(st.integers(1, 4))
    weights = st.lists(st.integers(0, 6), min_size=sources, max_size=sources).filter(any).map(tuple)
    first, phases = 0, [Phase(0, draw(weights))]
    for _ in range(draw(st.integers(0, 3))):
        first += draw(st.integers(1, 30))
        phases.append(Phase(first, draw(weights)))
    return phases, draw(st.lists(st.none() | st.integers(1, 25), min_size=sources, max_size=sources))


def phase_at(phases: list[Phase], number: int) -> Phase:
    return next(phase for phase in reversed(phases) if phase.first_sample <= number)


@given(mixture=mixtures())
@settings(max_examples=200, deadline=None)
def test_every_source_gives_its_share_at_every_sample(mixture: tuple[list[Phase], list[int | None]]) -> None:
    """The reference counts one sample after the other: each source in its order, none beyond its limit, and between
    two changes each within one sample per source of its exact share."""
    phases, limits = mixture
    mixed, taken = Mixture(phases, limits), [0] * len(limits)
    begin, before, active = 0, list(taken), [0] * len(limits)
    for number in range(150):
        left = [limit is None or count < limit for limit, count in zip(limits, taken, strict=True)]
        weights = [w if more else 0 for w, more in zip(phase_at(phases, number).weights, left, strict=True)]
        if not any(weights):
            assert mixed.end == number
            with pytest.raises(DataError, match=f"{number:,} samples in all"):
                mixed.source_of(number)
            assert mixed.counts(10**15) == taken
            return
        if weights != active or phase_at(phases, number).first_sample == number:
            begin, before, active = number, list(taken), weights
        assert mixed.counts(number) == taken
        source, turn = mixed.source_of(number)
        assert turn == taken[source] and weights[source] and mixed.number_of(source, turn) == number
        taken[source] += 1
        for index, weight in enumerate(weights):
            exact = (number + 1 - begin) * weight / sum(weights)
            assert abs(taken[index] - before[index] - exact) <= len(weights)
        if (number + 1 - begin) % sum(weights) == 0:  # whole periods are exact
            shares = [(number + 1 - begin) * weight // sum(weights) for weight in weights]
            assert [count - old for count, old in zip(taken, before, strict=True)] == shares
    assert mixed.end is None or mixed.end >= 150


@given(mixture=mixtures(), numbers=st.lists(st.integers(0, 10**12), min_size=1, max_size=6))
@settings(max_examples=60, deadline=None)
def test_any_sample_is_found_without_those_before_it(
    mixture: tuple[list[Phase], list[int | None]], numbers: list[int]
) -> None:
    used = Mixture(*mixture)
    for number in numbers:
        fresh = Mixture(*mixture)
        if used.end is not None and number >= used.end:
            continue
        assert used.source_of(number) == fresh.source_of(number)
        source, turn = fresh.source_of(number)
        after = [count + (index == source) for index, count in enumerate(fresh.counts(number))]
        assert fresh.counts(number)[source] == turn and fresh.counts(number + 1) == after


def test_a_source_leaves_at_an_exact_sample_and_the_others_go_on() -> None:
    mixed = Mixture([Phase(0, (2, 1)), Phase(100, (1, 1))], [7, None])
    assert mixed.exhausted == [Exhausted(0, 10)] and mixed.end is None
    assert [mixed.source_of(number) for number in (9, 10, 11, 99, 100)] == [(0, 6), (1, 3), (1, 4), (1, 92), (1, 93)]
    assert mixed.counts(10) == [7, 3] and mixed.counts(10**12) == [7, 10**12 - 7]


def test_a_source_whose_last_sample_is_the_last_of_a_phase_is_told_of() -> None:
    mixed = Mixture([Phase(0, (1,)), Phase(5, (1,))], [5])
    assert (mixed.exhausted, mixed.end) == ([Exhausted(0, 5)], 5)


def test_what_takes_too_long_to_lay_out_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmtrain.data.mixture.MOST_TURNS", 50)
    phases: list[Any] = [Phase(0, (1,) * 20)]
    assert Mixture(phases, [None] * 20).source_of(3) == (3, 0)
    with pytest.raises(DataError, match="takes too long to lay out"):
        Mixture(phases, [*range(1, 20), None])


@given(weights=st.lists(st.integers(0, 40), min_size=1, max_size=5).filter(any), number=st.integers(0, 10**6))
@settings(deadline=None)
def test_counts_and_numbers_of_a_schedule_agree(weights: list[int], number: int) -> None:
    schedule = MixtureSchedule(weights)
    source, turn = schedule.source_of(number)
    assert schedule.number_of(source, turn) == number
    assert schedule.counts(number)[source] == turn and schedule.counts(number).sum() == number
