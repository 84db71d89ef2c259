"""Early stopping needs evaluations, and the checkpoint that it was done for."""

import re
from typing import Any

import pytest

from tests.unit.config.small_run import broken, run

STOPPING: dict[str, Any] = {
    "data": {"valid": [{"path": "v"}]},
    "evaluate": {"every_steps": 50, "stop_after": 3},
    "checkpoint": {"every_steps": 25, "keep_best": True},
}


@pytest.mark.parametrize(
    ("changed", "key", "says"),
    [
        ({"evaluate": {"stop_after": 3}, "checkpoint": {}}, "evaluate.stop_after", r"=50\."),
        ({"data": {}, "evaluate": {"stop_after": 3}, "checkpoint": {}}, "evaluate.stop_after", r"=50 and data\.valid="),
        ({"checkpoint": {"every_steps": 50}}, "checkpoint.keep_best", "evaluate.stop_after = 3 .* Try true"),
        ({"checkpoint": {"every_steps": 20, "keep_best": True}}, "checkpoint.every_steps", "must divide .* Try 50"),
        ({"checkpoint": {"every_steps": 0, "keep_best": True}}, "checkpoint.every_steps", "must divide .* Try 50"),
        ({"evaluate": {"every_steps": 50, "min_improvement": 0.1}}, "evaluate.min_improvement", "stop_after=5"),
    ],
)
def test_an_early_stop_needs_evaluations_and_keeps_the_best(changed: dict[str, Any], key: str, says: str) -> None:
    assert broken(run(**STOPPING)) == {}
    problems = broken(run(**{**STOPPING, **changed}))
    assert list(problems) == [key] and re.search(says, problems[key])
