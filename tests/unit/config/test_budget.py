"""A budget in tokens is what is read, whatever the batch size is and was; its schedule follows it."""

from dataclasses import replace

import pytest

from llmtrain.config.budget import Budget, Seen, seen_by
from llmtrain.config.schema import OptimConfig
from llmtrain.optim.schedule import learning_rate
from llmtrain.train.state import TrainState

UNIT = 512
"""Tokens of a step of the run as it began."""


def trained(budget: Budget, state: TrainState, until: int = 1_000_000) -> tuple[TrainState, list[float]]:
    """The state at the end of the run, or after step `until`, and the rate of each step."""
    optim, rates = OptimConfig(lr=1.0, min_lr=0.1, warmup_steps=10), []
    while state.step < min(until, budget.last_step(state.seen)):
        place, length = budget.schedule(state.seen)
        rates.append(learning_rate(place, optim, length))
        state = state.advanced(8, 400, budget.tokens_per_step)
    return state, rates


@pytest.mark.parametrize("tokens", [100 * UNIT, 100 * UNIT + 1, 101 * UNIT - 1])
def test_with_one_batch_size_it_is_a_number_of_steps(tokens: int) -> None:
    by_tokens = trained(Budget(None, tokens, UNIT), TrainState())
    by_steps = trained(Budget(-(-tokens // UNIT), None, UNIT), TrainState())
    assert by_tokens == by_steps


@pytest.mark.parametrize(("factor", "last_step"), [(2, 70), (4, 55), (0.5, 160), (0.25, 280)])
def test_another_batch_size_changes_neither_the_tokens_nor_the_rate_at_any_of_them(
    factor: float, last_step: int
) -> None:
    tokens = 100 * UNIT
    size = int(factor * UNIT)
    half, _ = trained(Budget(None, tokens, UNIT), TrainState(), until=40)
    _, usual = trained(Budget(None, tokens, UNIT), half)
    assert Budget(None, tokens, size).last_step(half.seen) == last_step
    end, rates = trained(Budget(None, tokens, size), half)
    assert (end.step, end.data_tokens) == (last_step, tokens)
    if factor > 1:
        assert rates == usual[int(factor) - 1 :: int(factor)]
    else:
        assert rates[int(1 / factor) - 1 :: int(1 / factor)] == usual


def test_the_end_is_the_first_whole_step_that_reaches_the_budget_from_wherever_it_goes_on() -> None:
    budget = Budget(None, 10 * UNIT, 3 * UNIT)
    for read in range(0, 10 * UNIT + 1, 128):
        state = replace(TrainState(), step=5, data_tokens=read, first_step_tokens=UNIT)
        end, _ = trained(budget, state)
        assert 10 * UNIT <= end.data_tokens < 13 * UNIT
        assert end == state or end.data_tokens - 3 * UNIT < 10 * UNIT
    assert budget.last_step(Seen(5, 11 * UNIT, UNIT)) == 5


def test_warm_up_does_not_begin_again_with_a_larger_batch() -> None:
    warm, _ = trained(Budget(None, 100 * UNIT, UNIT), TrainState(), until=12)
    _, rates = trained(Budget(None, 100 * UNIT, 4 * UNIT), warm)
    assert rates == sorted(rates, reverse=True) and rates[0] > 0.99 * learning_rate(16, OptimConfig(lr=1.0), 100)


def test_a_longer_budget_goes_on_and_a_run_in_steps_stays_one_in_steps() -> None:
    end, _ = trained(Budget(None, 10 * UNIT, UNIT), TrainState())
    assert Budget(None, 15 * UNIT, 2 * UNIT).last_step(end.seen) == 13
    assert Budget(20, None, 2 * UNIT).last_step(end.seen) == 20
    assert Budget(20, None, 2 * UNIT).schedule(end.seen) == (11, 20)


def test_an_older_checkpoint_counts_by_its_position_and_its_own_batch_size() -> None:
    saved = {"step": 7, "samples": 112, "tokens": 1792}
    assert seen_by(saved, {"data": {"seq_len": 64}, "train": {"global_batch_size": 16}}) == Seen(7, 112 * 64, 16 * 64)
    assert seen_by(saved, {}) == Seen(7, 112 * 1024, 16 * 1024)
