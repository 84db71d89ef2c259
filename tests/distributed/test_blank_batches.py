"""Skipped shards leave ranks, or all of them, without a target: every engine goes on, and all ranks agree."""

import math
from typing import Any

import pytest
import torch

from llmtrain.config.schema import RunConfig
from llmtrain.parallel.layout import plan_layout
from llmtrain.train.setup import engine_class
from llmtrain.values.batch import IGNORED_LABEL, Batch
from tests.support.ranks import run_ranks
from tests.support.samples import random_batch, tiny_model, tiny_run

BLANK = {2: (0,), 3: (0, 1)}
"""Which of a step's two micro-batches have no target: in step 2 those of data rank 0, in step 3 all."""

CASES: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "torch dp2": (2, {"name": "torch"}, {}),
    "megatron dp2 zero 1": (2, {"name": "megatron", "zero_stage": 1}, {}),
    "megatron tp2": (2, {"name": "megatron"}, {"tensor": 2}),
    "megatron pp2": (2, {"name": "megatron"}, {"pipeline": 2}),
    "deepspeed dp2 zero 1": (2, {"name": "deepspeed", "zero_stage": 1}, {}),
    "deepspeed dp2 zero 3": (2, {"name": "deepspeed", "zero_stage": 3}, {}),
}

Step = tuple[float, float, int, bool]


def batches(step: int, data_rank: int, data_size: int) -> list[Batch]:
    found = []
    for number in range(data_rank, 2, data_size):
        batch = random_batch(seed=10 * step + number)
        if number in BLANK.get(step, ()):
            batch.labels_BS[:] = IGNORED_LABEL
        found.append(batch)
    return found


def train(rank: int, world_size: int, config: RunConfig) -> tuple[list[Step], list[tuple[float, int]]]:
    """Loss, gradient norm, targets and whether it was skipped of each step; sum of losses and number of targets of
    evaluations, one of which is blank on some ranks and one on all."""
    layout = plan_layout(config.parallel, world_size)
    data = layout.coordinates(rank).data, layout.data
    engine = engine_class(config.engine.name)(config, torch.device("cpu"))
    steps = []
    for step in range(1, 5):
        result = engine.train_step(step, batches(step, *data), 1e-2)
        steps.append((result.loss, result.grad_norm, result.num_tokens, result.skipped))
    evaluated = [engine.eval_step(batches(step, *data)) for step in (2, 3)]
    return steps, [(result.loss_sum, result.num_tokens) for result in evaluated]


def run(engine: dict[str, Any], parallel: dict[str, Any]) -> RunConfig:
    config = tiny_run(tiny_model(), {"global_batch_size": 4})
    return config.with_keys({"engine": engine, "parallel": parallel})


@pytest.mark.parametrize("name", CASES)
def test_steps_without_targets_are_like_those_of_one_process(name: str) -> None:
    ranks, engine, parallel = CASES[name]
    alone, evaluated = run_ranks(train, 1, run({"name": "torch"}, {}))[0]
    found, found_evaluated = run_ranks(train, ranks, run(engine, parallel), timeout_seconds=120)[0]
    targets = [4 * 32, 2 * 32, 0, 4 * 32]
    assert [step[2] for step in alone] == [step[2] for step in found] == targets
    assert alone[2][:2] == found[2][:2] == (0.0, 0.0)
    assert not any(step[3] for step in (*alone, *found))
    for expected, actual in zip(alone, found, strict=True):
        assert all(math.isfinite(value) for value in actual[:2])
        assert actual[:2] == pytest.approx(expected[:2], rel=1e-5)
    assert [tokens for _, tokens in evaluated] == [tokens for _, tokens in found_evaluated] == [2 * 32, 0]
    assert found_evaluated[0][0] == pytest.approx(evaluated[0][0], rel=1e-5)
    assert evaluated[1][0] == found_evaluated[1][0] == 0.0
