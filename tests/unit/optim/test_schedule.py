import math
from itertools import pairwise

import pytest

from llmtrain.config.schema import OptimConfig
from llmtrain.optim.schedule import learning_rate


def rates(total: int, **settings: object) -> list[float]:
    optim = OptimConfig(lr=1.0, min_lr=0.1, **settings)  # type: ignore[arg-type]
    return [learning_rate(step, optim, total) for step in range(1, total + 1)]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd", "inverse_sqrt", "constant"])
def test_warm_up_is_linear_and_reaches_the_peak(schedule: str) -> None:
    warm = rates(100, schedule=schedule, warmup_steps=10)[:10]
    assert warm == pytest.approx([step / 10 for step in range(1, 11)])


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_decay_ends_at_min_lr_and_never_rises(schedule: str) -> None:
    after = rates(100, schedule=schedule, warmup_steps=10)[9:]
    assert after[-1] == pytest.approx(0.1)
    assert all(a >= b for a, b in pairwise(after))


def test_cosine_and_linear_pass_the_middle_half_way() -> None:
    assert rates(100, schedule="cosine")[49] == pytest.approx(0.55)
    assert rates(100, schedule="linear")[49] == pytest.approx(0.55)
    assert rates(100, schedule="cosine")[24] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)


def test_decay_steps_end_the_decay_early() -> None:
    values = rates(100, schedule="linear", decay_steps=50)
    assert values[49] == pytest.approx(0.1)
    assert values[99] == pytest.approx(0.1)


def test_wsd_stays_then_decays_linearly() -> None:
    values = rates(100, schedule="wsd", warmup_steps=10, decay_steps=20)
    assert values[9:80] == pytest.approx([1.0] * 71)
    assert values[89] == pytest.approx(0.55)


def test_inverse_sqrt() -> None:
    values = rates(400, schedule="inverse_sqrt", warmup_steps=100)
    assert values[399] == pytest.approx(0.5)
    assert min(rates(100_000, schedule="inverse_sqrt", warmup_steps=1)) == 0.1


def test_constant() -> None:
    assert set(rates(50, schedule="constant", warmup_steps=5)[4:]) == {1.0}
