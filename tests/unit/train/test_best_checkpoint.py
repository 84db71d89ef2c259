"""The best checkpoint is kept whatever the rhythms of saves and evaluations are."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from launch.rank.place import Rank
from launch.rank.signals import StopSignal
from llmtrain.checkpoint.folders import checkpoint_steps, step_folder_name
from llmtrain.checkpoint.manifest import load_manifest
from llmtrain.config.schema import RunConfig
from llmtrain.train.loop import Evaluation, Run
from tests.support.small_runs import rows_of, small_run, train_here, write_data

NEVER_TOGETHER: dict[str, dict[str, Any]] = {
    "train": {"steps": 11},
    "evaluate": {"every_steps": 3, "steps": 1},
    "optim": {"lr": 1e-2},
}
"""Evaluated at 3, 6, 9; saved at 4, 8 and 11."""


@pytest.fixture(autouse=True)
def data(tmp_path: Path) -> None:
    write_data(tmp_path)


def folder_of(config: RunConfig, step: int) -> Path:
    return config.run_dir / "checkpoints" / step_folder_name(step)


def column(config: RunConfig, key: str) -> dict[int, float]:
    return {row["step"]: row[key] for row in rows_of(config) if key in row}


def metric(config: RunConfig, step: int) -> float | None:
    return load_manifest(folder_of(config, step)).about["metric"]


def worsening(run: Run, place: Rank) -> Run:
    """The loss of an evaluation is the number of steps that are done: the first checkpoint is the best."""

    class Worse(Evaluation):
        def run(self, engine: Any) -> tuple[float, int, list[float]]:
            return float(engine.state()["updates"]), 1, []

    evaluation = {each.name: getattr(run.evaluation, each.name) for each in fields(run.evaluation)}
    return replace(run, evaluation=Worse(**evaluation))


def test_saves_and_evaluations_that_never_coincide_keep_the_best(tmp_path: Path) -> None:
    config = small_run(tmp_path, **NEVER_TOGETHER, checkpoint={"keep": 1, "keep_best": True})
    assert train_here(config, worsening) == 0
    assert checkpoint_steps(folder_of(config, 4).parent) == [11, 4]
    assert column(config, "valid_loss") == {step: step for step in (3, 4, 6, 8, 9, 11)}
    assert (metric(config, 4), metric(config, 11)) == (4.0, 11.0)


def test_the_evaluations_beside_saves_change_no_number_of_training(tmp_path: Path) -> None:
    plain = small_run(tmp_path, **NEVER_TOGETHER)
    best = small_run(tmp_path, **NEVER_TOGETHER, checkpoint={"keep_best": True}).with_keys({"name": "best"})
    assert train_here(plain) == train_here(best) == 0
    assert column(plain, "loss") == column(best, "loss")
    few, more = column(plain, "valid_loss"), column(best, "valid_loss")
    assert sorted(few) == [3, 6, 9] and few == {step: more[step] for step in few}
    tensors = [(folder_of(config, 11) / "rank-00000.safetensors").read_bytes() for config in (plain, best)]
    assert tensors[0] == tensors[1]


@pytest.mark.parametrize("stopped_at", [4, 5])
def test_a_run_that_was_stopped_keeps_the_best_of_one_that_was_not(tmp_path: Path, stopped_at: int) -> None:
    """A save that only the signal caused is not evaluated: there is no time. One that is due anyway is."""
    config = small_run(tmp_path, **NEVER_TOGETHER, checkpoint={"keep": 1, "keep_best": True})

    class StopAt(StopSignal):
        @property
        def requested(self) -> bool:
            return max(column(config, "loss")) == stopped_at

    assert train_here(config, worsening, StopAt()) == 75
    assert (metric(config, stopped_at) is None) == (stopped_at == 5)
    assert train_here(config, worsening) == 0
    assert checkpoint_steps(folder_of(config, 4).parent) == [11, 4]
    assert column(config, "valid_loss") == {step: step for step in (3, 4, 6, 8, 9, 11)}


@pytest.mark.parametrize(("changed", "best"), [({}, 4), ({"steps": 2}, 12)])
def test_losses_on_other_validation_data_are_not_compared(tmp_path: Path, changed: dict[str, int], best: int) -> None:
    """The run goes on and reads more of its validation data: what it had before says nothing about that."""
    settings = {**NEVER_TOGETHER, "checkpoint": {"keep": 1, "keep_best": True}}
    assert train_here(small_run(tmp_path, **settings), worsening) == 0
    longer = {"train": {"steps": 16}, "evaluate": {**NEVER_TOGETHER["evaluate"], **changed}}
    config = small_run(tmp_path, **{**settings, **longer})
    assert train_here(config, worsening) == 0
    assert checkpoint_steps(folder_of(config, best).parent) == [16, best]
