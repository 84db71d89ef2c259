"""The sizes of steps: against a list of all of them."""

from hypothesis import given
from hypothesis import strategies as st

from llmtrain.config.batch_sizes import BatchSizes
from llmtrain.config.budget import Budget, Seen
from tests.unit.config.small_run import run


@st.composite
def ramps(draw: st.DrawFn) -> BatchSizes:
    done = sorted(draw(st.sets(st.integers(1, 30), max_size=4)))
    return BatchSizes(tuple(draw(st.integers(1, 9)) for _ in range(len(done) + 1)), (0, *done))


@given(sizes=ramps(), done=st.integers(0, 50), total=st.integers(0, 300))
def test_sums_are_those_of_the_steps(sizes: BatchSizes, done: int, total: int) -> None:
    steps = [sizes.of_step(step) for step in range(1, 400)]
    changes = dict(zip(sizes.done, sizes.sizes, strict=True))
    size = 0
    for step, found in enumerate(steps):
        size = changes.get(step, size)
        assert found == size
    assert sizes.before(done + 1) == sum(steps[:done])
    last, read = done, 0
    while read < total:
        read, last = read + steps[last], last + 1
    assert sizes.last_step(total, done) == last
    assert sizes.scaled(7).last_step(7 * total, done) == last and sizes.scaled(7).before(done + 1) == 7 * sum(
        steps[:done]
    )


RAMP = [{"from_step": 3, "global_batch_size": 16}, {"from_step": 5, "global_batch_size": 32}]


def test_a_budget_of_tokens_ends_where_the_ramp_has_read_them() -> None:
    """Steps of 8, 8, 16, 16, 32, 32, ... samples of 64 tokens, in any two parts."""
    config = run(train={"steps": None, "tokens": 110 * 64, "batch_ramp": RAMP})
    budget = Budget.of(config)
    assert config.total_steps == budget.last_step(Seen()) == 6
    sizes = [budget.tokens_of(step) for step in range(1, 8)]
    assert sizes == [64 * size for size in (8, 8, 16, 16, 32, 32, 32)]
    for step in range(7):
        seen = Seen(step, sum(sizes[:step]), sizes[0] if step else 0)
        assert budget.last_step(seen) == 6
        if step < 6:
            place, length = budget.schedule(seen)
            assert (place, length) == (sum(sizes[: step + 1]) / sizes[0], -(-110 // 8))
    by_steps = Budget.of(run(train={"steps": 6, "batch_ramp": RAMP}))
    assert [by_steps.schedule(Seen(step)) for step in range(3)] == [(1, 6), (2, 6), (3, 6)]
