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


TASKS: dict[str, Any] = {"evaluate": {"tasks": ["tasks.yaml"], "tasks_every_steps": 50}}
ENCODES = {"family": "encoder_decoder", "num_encoder_layers": 2, "position": "t5_relative"}


@pytest.mark.parametrize(
    ("changed", "key", "says"),
    [
        ({"evaluate": {"tasks": ["tasks.yaml"]}}, "evaluate.tasks_every_steps", r"\[tasks\.yaml\]\. Try 500"),
        ({"evaluate": {"tasks_every_steps": 5}}, "evaluate.tasks_every_steps", "needs evaluate.tasks, which is empty"),
        ({"model": {"family": "encoder", "head": "mlm"}}, "evaluate.tasks", "model.family = encoder"),
        ({"model": {"head": "classifier", "num_labels": 2}}, "evaluate.tasks", "model.head = classifier"),
        ({"model": {"moe": {"num_experts": 4, "router": "expert_choice"}}}, "evaluate.tasks", "experts choose among"),
        (
            {
                "model": {**ENCODES, "max_seq_len": 1022},
                "engine": {"name": "megatron"},
                "parallel": {"context": 4},
                "launch": {"num_workers": 4},
            },
            "model.max_seq_len",
            "multiple of the 4 parts .* Try 1020 or 1024",
        ),
    ],
)
def test_tasks_in_training_need_steps_and_a_model_of_text(changed: dict[str, Any], key: str, says: str) -> None:
    assert broken(run(**TASKS)) == {}
    problems = broken(run(**{**TASKS, **changed}))
    assert re.search(says, problems[key]), problems
