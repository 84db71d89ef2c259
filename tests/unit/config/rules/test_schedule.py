"""A schedule that is longer than its run is told, not refused."""

from typing import Any

import pytest

from llmtrain.config.rules.arithmetic import schedule_warnings
from llmtrain.optim.schedule import learning_rate
from tests.unit.config.small_run import broken, run

WSD = {"schedule": "wsd", "warmup_steps": 10}


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd", "inverse_sqrt", "constant"])
@pytest.mark.parametrize("steps", [20, 49, 50])
def test_a_run_within_its_warm_up_is_the_beginning_of_a_longer_one(schedule: str, steps: int) -> None:
    optim = {"schedule": schedule, "warmup_steps": 50, "lr": 1e-3}
    short, long = run(train={"steps": steps}, optim=optim), run(train={"steps": 1000}, optim=optim)
    assert broken(short) == {}
    rates = [
        [learning_rate(step, made.optim, made.total_steps) for step in range(1, steps + 1)] for made in (short, long)
    ]
    assert rates[0] == rates[1]
    (warning,) = schedule_warnings(short)
    assert f"rises to {rates[0][-1]:g}, of optim.lr = 0.001" in warning
    assert f"optim.warmup_steps={steps // 10}." in warning
    assert schedule_warnings(long) == []


def test_a_decay_takes_what_warm_up_leaves_and_ends_at_min_lr() -> None:
    short = run(train={"steps": 20}, optim={**WSD, "lr": 1e-3, "min_lr": 1e-4, "decay_steps": 40})
    assert broken(short) == {}
    assert learning_rate(10, short.optim, 20) == pytest.approx(1e-3)
    assert learning_rate(20, short.optim, 20) == pytest.approx(1e-4)
    (warning,) = schedule_warnings(short)
    assert "the decay takes 10. Set optim.decay_steps=10 or less" in warning


@pytest.mark.parametrize("optim", [{}, {"warmup_steps": 99}, {**WSD, "decay_steps": 90}, {"decay_steps": 1000}])
def test_a_schedule_that_the_run_has_room_for_is_not_spoken_of(optim: dict[str, Any]) -> None:
    assert schedule_warnings(run(optim=optim)) == []


@pytest.mark.parametrize(
    ("patterns", "key", "says"),
    [
        (["embedings.*"], "optim.freeze.0", "fits no parameter of the model. Try embeddings.word.weight"),
        (["embeddings.*", "decoder.layers.99.*"], "optim.freeze.1", "fits no parameter"),
        (["*"], "optim.freeze", "nothing is left to train"),
    ],
)
def test_patterns_of_frozen_parameters(patterns: list[str], key: str, says: str) -> None:
    assert says in broken(run(optim={"freeze": patterns}))[key]
    assert broken(run(optim={"freeze": ["embeddings.*"]})) == {}


def test_patterns_of_learning_rates() -> None:
    scaled = [{"names": ["embeddings.*"], "scale": 2}, {"names": ["*norm*", "encoder.*"], "scale": 0.5}]
    found = broken(run(optim={"lr_scale": scaled}))
    assert "fits no parameter that is trained" in found.pop("optim.lr_scale.1.names.1")
    assert found == {}
    frozen = broken(run(optim={"lr_scale": scaled[:1], "freeze": ["embeddings.*"]}))
    assert list(frozen) == ["optim.lr_scale.0.names.0"]


def test_the_first_pattern_that_fits_counts() -> None:
    optim = run(optim={"lr_scale": [{"names": ["*.q.*"], "scale": 2}, {"names": ["decoder.*"], "scale": 3}]}).optim
    names = ("decoder.layers.0.attention.q.weight", "decoder.layers.0.attention.k.weight", "embeddings.word.weight")
    assert [optim.scale_of(name) for name in names] == [2, 3, 1]
