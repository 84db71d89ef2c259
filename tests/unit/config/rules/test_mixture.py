"""Rules of mixtures, packing and the batch's ramp: what breaks them, and that what they suggest is legal."""

from typing import Any

import pytest

from llmtrain.config.rules.mixture import first_sample_of
from llmtrain.config.schema import RunConfig
from tests.unit.config.small_run import broken, run

TWO: list[Any] = [{"path": "a"}, {"path": "b"}]
LATER: list[Any] = [{"path": "a"}, {"path": "b", "weight": 0}]
FIRST = [{"from_step": 1, "global_batch_size": 16}]
RAMP = [{"from_step": 11, "global_batch_size": 16}, {"from_step": 21, "global_batch_size": 32}]


def phases(*found: dict[str, Any], **train: Any) -> RunConfig:
    return run(data={"train": TWO, "schedule": list(found)}, train=train)


@pytest.mark.parametrize(
    "config",
    [
        phases({"from_step": 2, "weights": [1, 0]}, {"from_sample": 100, "weights": [0, 3]}),
        run(data={"train": LATER, "schedule": [{"from_step": 9, "weights": [1, 1]}]}),
        run(data={"train": [{"path": "a", "max_epochs": 2, "max_tokens": 10**12}]}),
        run(data={"packing": "best_fit", "reset_attention": True}),
        run(train={"batch_ramp": RAMP}),
        run(data={"objective": "chat"}),
        run(data={"objective": "chat", "packing": "single", "chat": {"train_on": "last", "too_long": "drop"}}),
        run(model={"position": "alibi"}, data={"objective": "chat", "reset_positions": True}),
    ],
)  # fmt: skip
def test_legal(config: RunConfig) -> None:
    assert broken(config) == {}


@pytest.mark.parametrize(
    ("config", "key", "says"),
    [
        (phases({"weights": [1, 1]}), "data.schedule.0", "needs from_step or from_sample"),
        (phases({"from_step": 5, "from_sample": 9, "weights": [1, 1]}), "data.schedule.0", "one of the two"),
        (phases({"from_step": 1, "weights": [1, 1]}), "data.schedule.0.from_step", "with the weights of data.train"),
        (
            phases({"from_step": 11, "weights": [1, 1]}, {"from_sample": 80, "weights": [1, 2]}),
            "data.schedule.1.from_sample",
            "is sample 80",
        ),
        (phases({"from_step": 5, "weights": [1]}), "data.schedule.0.weights", "has 1 entries, and data.train has 2"),
        (phases({"from_step": 5, "weights": [0, 0]}), "data.schedule.0.weights", "gives no source any weight"),
        (phases({"from_step": 5, "weights": [1, 1_000_000]}), "data.schedule.0.weights", "1,000,000 at most"),
        (run(data={"train": [{"path": "a", "weight": 0}]}), "data.train", "gives no source any weight"),
        (
            run(data={"train": LATER}),
            "data.train.1.weight",
            "no phase of data.schedule gives",
        ),
        (run(train={"batch_ramp": FIRST}), "train.batch_ramp.0.from_step", "Try 2"),
        (run(train={"batch_ramp": RAMP[::-1]}), "train.batch_ramp.1.from_step", "the one before has 21. Try 22"),
        (
            run(train={"batch_ramp": [{"from_step": 5, "global_batch_size": 8}]}),
            "train.batch_ramp.0.global_batch_size",
            "has this size already",
        ),
        (
            run(train={"batch_ramp": [{"from_step": 5, "global_batch_size": 10}]}),
            "train.batch_ramp.0.global_batch_size",
            "must be a multiple of train.micro_batch_size x data parallel size = 4 x 1 = 4. Try 8 or 12",
        ),
        (run(data={"packing": "best_fit", "windows": "continuous"}), "data.windows", "samples are no windows"),
        (
            run(data={"packing": "best_fit", "objective": "prefix"}),
            "data.packing",
            "does not go with data.objective = prefix",
        ),
        (
            run(data={"packing": "none", "objective": "chat"}),
            "data.packing",
            "would cut documents, which data.objective = chat never does. Try best_fit or single",
        ),
        (
            run(data={"packing": "single"}),
            "data.packing",
            "most of a sample would be padding. Try none or best_fit; single goes with chat",
        ),
        (run(data={"objective": "chat", "windows": "continuous"}), "data.windows", "data.packing = best_fit"),
    ],
)  # fmt: skip
def test_rule_is_broken(config: RunConfig, key: str, says: str) -> None:
    problems = broken(config)
    assert says in problems[key], problems


def test_every_size_fits_the_ranks() -> None:
    config = run(train={"micro_batch_size": 2, "batch_ramp": [{"from_step": 5, "global_batch_size": 12}]})
    assert broken(config, 2) == {}
    assert list(broken(config, 4)) == ["train.batch_ramp.0.global_batch_size"]


def test_a_phase_begins_with_the_first_sample_of_its_step() -> None:
    config = phases({"from_step": 13, "weights": [1, 1]}, {"from_sample": 900, "weights": [1, 1]}, batch_ramp=RAMP)
    assert [first_sample_of(config, number) for number in range(2)] == [10 * 8 + 2 * 16, 900]
