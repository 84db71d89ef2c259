"""The best checkpoint is kept whatever the rhythms of saves and evaluations are."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launch.rank.place import Rank
from launch.rank.signals import StopSignal
from llmtrain.checkpoint.find import best_checkpoint
from llmtrain.checkpoint.folders import checkpoint_steps, step_folder_name
from llmtrain.checkpoint.manifest import load_manifest
from llmtrain.cli import main
from llmtrain.config.schema import RunConfig
from llmtrain.data.storage.targets import LabelsRecord
from llmtrain.report.results import checkpoint_section, summary
from llmtrain.report.run_record import load_run
from llmtrain.runs.status import read_status
from llmtrain.train.loop import Evaluation, Run
from tests.support.datasets import write_target_dataset
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


LABELLED: dict[str, Any] = {
    "model": {"family": "encoder", "position": "learned", "head": "classifier"},
    "train": {"steps": 12},
    "evaluate": {"every_steps": 4, "metric": "accuracy"},
    "checkpoint": {"keep": 1, "keep_best": True},
}


def labelled_run(folder: Path, **sections: dict[str, Any]) -> RunConfig:
    """A classifier of labels at random."""
    if not (folder / "labels").exists():
        texts = [(np.arange(6, 12), np.array([n % 3])) for n in range(9)]
        write_target_dataset(folder / "labels", [texts], LabelsRecord("classification", ("a", "b", "c")))
    sources = [{"path": str(folder / "labels")}]
    data = {"objective": "labels", "train": sources, "valid": sources}
    merged = {name: {**LABELLED.get(name, {}), **sections.get(name, {})} for name in {**LABELLED, **sections}}
    return small_run(folder, data=data, **merged)


def judged(run: Run, place: Rank) -> Run:
    """Of ten texts 5, 9 and 7 are right at steps 4, 8 and 12, while the loss falls."""

    class Judged(Evaluation):
        def run(self, engine: Any) -> tuple[float, int, list[float]]:
            step = engine.state()["updates"]
            right = {4: 5.0, 8: 9.0, 12: 7.0, 16: 8.0}[step]
            return 20.0 - step, 10, [right, 0, 0, right, 10 - right, 0, 10, 0, 0]

    evaluation = {each.name: getattr(run.evaluation, each.name) for each in fields(run.evaluation)}
    return replace(run, evaluation=Judged(**evaluation))


def test_the_best_by_another_metric_is_kept_and_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = labelled_run(tmp_path)
    assert train_here(config, judged) == 0
    assert checkpoint_steps(folder_of(config, 8).parent) == [12, 8]
    assert best_checkpoint(config.run_dir) == folder_of(config, 8)
    status = read_status(config.run_dir)
    assert status is not None and status.message.endswith("step-00000008, validation accuracy 0.9")
    cells = {label: told for label, *told in summary(load_run(config.run_dir))}
    assert cells["Best validation"] == ["90.00%", "accuracy at step 8"]
    page = checkpoint_section([load_run(config.run_dir)])
    assert "12.0000, accuracy 90.00%" in page
    with pytest.raises(SystemExit):
        main(["checkpoint", "list", str(config.run_dir)])
    assert "accuracy 0.9\t" in capsys.readouterr().out


def test_it_ends_early_by_another_metric(tmp_path: Path) -> None:
    stop = {"evaluate": {"every_steps": 4, "metric": "accuracy", "stop_after": 2}, "train": {"steps": 40}}
    config = labelled_run(tmp_path, **stop)
    assert train_here(config, judged) == 0
    status = read_status(config.run_dir)
    assert status is not None and (status.status, status.step) == ("done", 16)
    assert "2 evaluations in a row without a validation accuracy above the 0.9 of step 8" in status.message


def test_values_of_another_metric_are_not_compared(tmp_path: Path) -> None:
    assert train_here(labelled_run(tmp_path), judged) == 0
    by_loss = {"evaluate": {"every_steps": 4, "metric": "loss"}, "train": {"steps": 16}}
    config = labelled_run(tmp_path, **by_loss)
    assert train_here(config, judged) == 0
    assert checkpoint_steps(folder_of(config, 16).parent) == [16]
    assert best_checkpoint(config.run_dir) == folder_of(config, 16)
    assert load_manifest(folder_of(config, 16)).about["best_by"] == "loss"
