"""What is recorded has steps, ranks and a place: what is refused names the fix, and the fix is accepted."""

from typing import Any

import pytest

from llmtrain.config.reading.validation import validate
from llmtrain.config.schema import RunConfig
from tests.unit.config.small_run import BASE, broken, run

URL = {"data": {"train": [{"path": "https://user:secret@example.org/shards"}]}}
FINAL = {"observe": {"wandb_artifacts": "final"}}


@pytest.mark.parametrize(
    ("sections", "key", "says"),
    [
        (
            {"observe": {"layer_norms_every_steps": 25, "log_every_steps": 10}},
            "observe.layer_norms_every_steps",
            "must be a multiple of observe.log_every_steps = 10, whose rows carry them. Try 20 or 30.",
        ),
        ({"observe": {"profile": {"steps": [12, 10]}}}, "observe.profile.steps", "Try [10, 12]."),
        (
            {"observe": {"profile": {"steps": [100, 102]}}, "train": {"steps": 50}},
            "observe.profile.steps",
            "the run ends with step 50. Try [48, 50].",
        ),
        (
            {"observe": {"profile": {"steps": [1, 2], "ranks": [0, 4]}}},
            "observe.profile.ranks",
            "there is rank 0 only (launch.num_workers = 1). Try [0].",
        ),
        (
            {"observe": {"wandb": "off", "wandb_artifacts": "final"}},
            "observe.wandb_artifacts",
            "Try none, or observe.wandb=offline.",
        ),
    ],
)
def test_rule_is_broken(sections: dict[str, Any], key: str, says: str) -> None:
    assert says in broken(run(**sections))[key]
    assert "secret" not in str(broken(run(**sections)))


@pytest.mark.parametrize(
    "sections",
    [
        {"observe": {"layer_norms_every_steps": 20, "log_every_steps": 10}},
        {"observe": {"profile": {"steps": [1, 10], "ranks": [0]}}, "train": {"steps": 10}},
        FINAL,
        {**URL, **FINAL},  # a checkpoint's config.yaml has no credentials
    ],
)
def test_rules_allow(sections: dict[str, Any]) -> None:
    assert broken(run(**sections)) == {}


@pytest.mark.parametrize(
    ("profile", "key", "says"),
    [
        ({}, "observe.profile.steps", "is required. First and last traced step"),
        ({"steps": [10]}, "observe.profile.steps.1", "is required"),
        ({"steps": 10}, "observe.profile.steps", "must be a list"),
        ({"steps": [0, 3]}, "observe.profile.steps.0", "must be at least 1"),
        ({"steps": [1, 3], "ranks": []}, "observe.profile.ranks", "must have at least 1 entry"),
    ],
)
def test_a_window_that_is_none_is_refused(profile: dict[str, Any], key: str, says: str) -> None:
    problems = {
        problem.key: problem.message
        for problem in validate({**BASE, "observe": {"profile": profile}}, RunConfig).problems
    }
    assert list(problems) == [key]
    assert says in problems[key]
