"""A run ends when its validation loss has not improved for long enough, interrupted or not, and names its best."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from launch.rank.place import Rank
from launch.rank.signals import StopSignal
from llmtrain.checkpoint.find import best_checkpoint
from llmtrain.checkpoint.folders import checkpoint_steps
from llmtrain.checkpoint.reader import open_checkpoint
from llmtrain.config.patience import EarlyStop, Patience
from llmtrain.config.schema import RunConfig
from llmtrain.errors import ConfigError
from llmtrain.preflight.dry_run import find_continuation, plan_dry_run
from llmtrain.preflight.resolve import resolve
from llmtrain.report.efficiency import DONE, STOPPED_EARLY
from llmtrain.runs.audit import ROLLBACK, iter_events
from llmtrain.runs.status import read_status
from llmtrain.train.loop import Evaluation, Run
from llmtrain.train.state import TrainState
from llmtrain.values.progress import StepResult
from tests.support.small_runs import rows_of, small_run, train_here, write_data

LOSSES = (5.0, 4.0, 3.0, 3.5, 2.95, 3.1, 3.2, 3.3, 1.0)
"""Of evaluations in their order."""

SETTINGS: dict[str, Any] = {
    "train": {"steps": 20},
    "evaluate": {"every_steps": 2, "steps": 1, "stop_after": 3},
    "checkpoint": {"every_steps": 2, "keep": 1, "keep_best": True},
}


@pytest.fixture(autouse=True)
def data(tmp_path: Path) -> None:
    write_data(tmp_path)


def with_losses(losses: Sequence[float] = LOSSES) -> Callable[[Run, Rank], Run]:
    """The loss of an evaluation is the one of its step: a run that goes back sees the same ones again."""

    class Given(Evaluation):
        def run(self, engine: Any) -> tuple[float, int, list[float]]:
            return losses[engine.state()["updates"] // self.every_steps - 1], 1, []

    def change(run: Run, place: Rank) -> Run:
        evaluation = {each.name: getattr(run.evaluation, each.name) for each in fields(run.evaluation)}
        return replace(run, evaluation=Given(**evaluation))

    return change


class StopAt(StopSignal):
    """Asked to stop at a step."""

    def __init__(self, config: RunConfig, step: int) -> None:
        super().__init__()
        self._config, self._step = config, step

    @property
    def requested(self) -> bool:
        return rows_of(self._config)[-1]["step"] == self._step


def state_of(config: RunConfig, step: int) -> dict[str, Any]:
    return dict(open_checkpoint(config.run_dir / "checkpoints" / f"step-{step:08d}").state["train"])


def weights_of(config: RunConfig, step: int) -> bytes:
    return (config.run_dir / f"checkpoints/step-{step:08d}/rank-00000.safetensors").read_bytes()


def test_it_ends_early_keeps_and_names_the_best_and_says_so_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small_run(tmp_path, **SETTINGS)
    assert train_here(config, with_losses()) == 0
    assert max(row["step"] for row in rows_of(config)) == 16
    assert checkpoint_steps(config.run_dir / "checkpoints") == [16, 10]
    status = read_status(config.run_dir)
    assert status is not None and (status.status, status.step, status.total_steps) == ("done", 16, 20)
    best = config.run_dir / "checkpoints/step-00000010"
    why = (
        "stopped early at step 16: 3 evaluations in a row without a validation loss below the 2.95 of step 10 "
        f"(evaluate.stop_after = 3); best checkpoint: {best}, validation loss 2.95"
    )
    assert status.message == why and "evaluate.stop_after" in status.next_action
    assert why in capsys.readouterr().err
    assert best_checkpoint(config.run_dir) == best
    (event,) = iter_events(config.run_dir, DONE, STOPPED_EARLY)
    assert event["event"] == STOPPED_EARLY and event["step"] == 16

    assert train_here(config, with_losses()) == 0
    said = capsys.readouterr().out
    assert f"already done: {why}" in said and "Raise evaluate.stop_after above 3" in said
    assert max(row["step"] for row in rows_of(config)) == 16
    plan = plan_dry_run(resolve(config), find_continuation(config))
    assert plan.stopped_early and plan.stop_after == 3

    patient = small_run(tmp_path, **{**SETTINGS, "evaluate": {**SETTINGS["evaluate"], "stop_after": 4}})
    assert train_here(patient, with_losses((*LOSSES, 2.0))) == 0
    assert max(row["step"] for row in rows_of(config)) == 20
    assert checkpoint_steps(config.run_dir / "checkpoints") == [20, 18]


@pytest.mark.parametrize("stopped_at", [11, 12, 15])
def test_a_run_that_was_interrupted_ends_where_one_that_was_not_does(tmp_path: Path, stopped_at: int) -> None:
    """Told to stop at a step without evaluation, behind one that is no improvement, and right before the last one."""
    whole = small_run(tmp_path, **SETTINGS)
    assert train_here(whole, with_losses()) == 0
    broken = small_run(tmp_path, **SETTINGS).with_keys({"name": "broken"})
    assert train_here(broken, with_losses(), StopAt(broken, stopped_at)) == 75
    assert train_here(broken, with_losses()) == 0
    assert state_of(broken, 16) == state_of(whole, 16)
    assert weights_of(broken, 16) == weights_of(whole, 16)
    assert checkpoint_steps(broken.run_dir / "checkpoints") == [16, 10]


def test_told_to_stop_at_its_last_step_it_is_done(tmp_path: Path) -> None:
    config = small_run(tmp_path, **SETTINGS)
    assert train_here(config, with_losses(), StopAt(config, 16)) == 0


def test_a_run_that_goes_back_counts_the_evaluations_once(tmp_path: Path) -> None:
    """At step 13 the gradient is not finite, once: back to step 10, and the evaluation of step 12 comes again."""
    health = {"rollback": True, "max_strikes": 1, "rerun": False}
    settings = {**SETTINGS, "checkpoint": {**SETTINGS["checkpoint"], "keep": 3}, "train": {"steps": 40}}
    config = small_run(tmp_path, **settings, health=health)

    def spoiled(run: Run, place: Rank) -> Run:
        train_step, met = run.engine.train_step, []

        def step_once_bad(step: int, micro_batches: Any, lr: float) -> StepResult:
            if step == 13 and not met:
                met.append(step)
                return StepResult(math.nan, math.nan, 1, skipped=True)
            return train_step(step, micro_batches, lr)

        run.engine.train_step = step_once_bad
        return with_losses()(run, place)

    assert train_here(config, spoiled) == 0
    (event,) = iter_events(config.run_dir, ROLLBACK)
    assert (event["step"], event["to_step"]) == (13, 10)
    assert max(row["step"] for row in rows_of(config)) == 16
    assert state_of(config, 16)["patience"]["evaluations"] == 3


def test_evaluations_that_a_save_brings_about_do_not_count(tmp_path: Path) -> None:
    """Saved at every step, evaluated so too; a run that saves less often ends at the same step."""
    often = {**SETTINGS, "checkpoint": {**SETTINGS["checkpoint"], "every_steps": 1}}
    config = small_run(tmp_path, **often)
    assert train_here(config, with_losses()) == 0
    assert max(row["step"] for row in rows_of(config)) == 16
    assert len([row for row in rows_of(config) if "valid_loss" in row]) == 16


def test_other_validation_data_begins_the_count_anew(tmp_path: Path) -> None:
    assert train_here(small_run(tmp_path, **SETTINGS), with_losses()) == 0
    more = small_run(tmp_path, **{**SETTINGS, "evaluate": {**SETTINGS["evaluate"], "steps": 2}})
    assert train_here(more, with_losses((*LOSSES, 2.0))) == 0
    assert state_of(more, 20)["patience"]["evaluations"] == 1
    assert state_of(more, 20)["patience"]["value"] == 1.0


def test_without_stop_after_nothing_is_counted(tmp_path: Path) -> None:
    config = small_run(tmp_path, evaluate={"every_steps": 2, "steps": 1}, train={"steps": 4})
    assert train_here(config) == 0
    assert Patience(**state_of(config, 4)["patience"]) == Patience()


def outcome(losses: Sequence[float], **keys: Any) -> tuple[int | None, Patience]:
    """The evaluation at which a run ends, and the count then."""
    stop, patience = EarlyStop(**{"stop_after": 3, "min_improvement": 0.0, "measured_on": "x", **keys}), Patience()
    for number, loss in enumerate(losses, start=1):
        patience = stop.after(patience, number, loss)
        if stop.is_over(patience):
            return number, patience
    return None, patience


def test_counts() -> None:
    assert outcome([3, 2, 2, 2])[0] is None
    assert outcome([3, 2, 2, 2, 2])[0] == 5, "the same loss is no improvement"
    assert outcome([3, 2, 2.1, 2.1, 1.9, 2, 2])[1] == Patience(1.9, 5, 2, "x")
    assert outcome([3, 2.9, 2.8, 2.7], min_improvement=0.5)[0] == 4
    assert outcome([3, 2.9, 2.8, 2.4, 2.3, 2.2], min_improvement=0.5)[0] is None, "small improvements add up"
    assert outcome([3, 2.5, 2.5, 2.5], min_improvement=0.5)[0] == 4, "it must be more than that"
    assert outcome([math.nan] * 3) == (3, Patience(None, 0, 3, "x"))
    assert outcome([math.nan, math.inf, 7, math.nan, math.nan])[1] == Patience(7, 3, 2, "x")
    assert not EarlyStop(1, 0, "y").is_over(outcome([1, 1, 1, 1])[1])


def test_counts_of_what_rises() -> None:
    up: Any = {"metric": "accuracy"}
    assert outcome([0.1, 0.2, 0.2, 0.3, 0.29, 0.1], **up) == (None, Patience(0.3, 4, 2, "x"))
    assert outcome([0.9, 0.2, 0.2, 0.3], **up) == (4, Patience(0.9, 1, 3, "x"))
    assert outcome([0.5, 0.6, 0.7, 0.71], min_improvement=0.3, **up)[0] == 4
    assert outcome([math.nan, -math.inf, math.inf], **up) == (3, Patience(None, 0, 3, "x"))


def test_the_count_survives_a_checkpoint() -> None:
    state = TrainState(step=3, patience=Patience(2.5, 2, 1, "x"))
    assert TrainState.from_json(json.loads(json.dumps(state.to_json())), {}) == state
    assert state.advanced(4, 100, 128).patience == state.patience
    older = {**state.to_json(), "patience": {"loss": 2.5, "step": 2, "evaluations": 1, "measured_on": "x"}}
    assert TrainState.from_json(older, {}) == state


@pytest.mark.parametrize("given", ["run without a loss", "checkpoint"])
def test_the_best_of_what_has_none_is_refused(tmp_path: Path, given: str) -> None:
    config = small_run(tmp_path, train={"steps": 4})
    assert train_here(config) == 0
    path = config.run_dir / "checkpoints/step-00000004" if given == "checkpoint" else config.run_dir
    with pytest.raises(ConfigError, match="Give a run folder" if given == "checkpoint" else "keep_best=true"):
        best_checkpoint(path)
