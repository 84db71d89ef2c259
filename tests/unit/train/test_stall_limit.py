"""A run whose steps change nothing is given up, and never called done."""

import json
from pathlib import Path
from typing import Any

import pytest

from launch.rank.signals import StopSignal
from llmtrain.checkpoint.folders import checkpoint_steps
from llmtrain.checkpoint.reader import open_checkpoint
from llmtrain.checks.drill.faults import Fault, inject, nothing
from llmtrain.checks.drill.single_faults import drill_config, undisturbed
from llmtrain.config.schema import RunConfig
from llmtrain.errors import LlmtrainError, NoProgressError
from llmtrain.preflight.resolve import ResolvedRun
from llmtrain.report.efficiency import DONE
from llmtrain.runs.audit import iter_events
from llmtrain.runs.status import read_status
from llmtrain.train.health import StallLimit, skipped_text
from llmtrain.train.state import TrainState, saved_state
from tests.support.small_runs import rows_of, small_run, train_here, write_data
from tests.unit.checkpoint.saved import save

DESTROYED = Fault("weights destroyed", nothing, lr_factor=1e30)
"""The step makes an update, and no step after it has a finite gradient."""

OVERFLOW: dict[str, Any] = {
    "train": {"precision": "fp16", "steps": 5},
    "optim": {"loss_scale": {"initial": 2.0**48}},
    "model": {"vocab_size": 300},
}
"""A loss scale that a run of five steps cannot lower far enough."""


@pytest.fixture(autouse=True)
def data(tmp_path: Path) -> None:
    write_data(tmp_path)


def given_up(config: RunConfig, destroyed_at: int = 0) -> str:
    """What is said of a run that ends with 93, and what its folder says then."""
    change_run = inject(DESTROYED, config, destroyed_at) if destroyed_at else None
    folder = config.run_dir
    before = list(iter_events(folder, DONE))
    with pytest.raises(NoProgressError) as error:
        train_here(config, change_run)
    assert error.value.exit_code == 93
    status = read_status(folder)
    assert status is not None and status.status == "stalled" and str(error.value) in status.cause
    assert list(iter_events(folder, DONE)) == before
    return str(error.value)


def saved(config: RunConfig) -> list[int]:
    return checkpoint_steps(config.run_dir / "checkpoints")


def test_a_run_of_skipped_steps_is_not_done_nor_is_it_when_started_again(tmp_path: Path) -> None:
    config = small_run(tmp_path, **OVERFLOW)
    said = given_up(config)
    assert "each of the run's 5 steps was skipped" in said and "optim.loss_scale.initial" in said
    assert [row["skipped"] for row in rows_of(config)] == [1] * 5
    assert saved(config)[0] == 5
    assert "each of the run's 5 steps was skipped" in given_up(config)
    longer = small_run(tmp_path, **{**OVERFLOW, "train": {"precision": "fp16", "steps": 60}})
    assert train_here(longer) == 0


@pytest.mark.parametrize(("updates", "skipped"), [(0, 7), (3, 0)])
def test_an_older_checkpoint_says_whether_any_step_has_changed_it(tmp_path: Path, updates: int, skipped: int) -> None:
    train = {"step": 7, "samples": 112, "tokens": 1792}
    state = {"train": train, "engine": {"updates": updates, "loss_scale": None}}
    assert saved_state(open_checkpoint(save(tmp_path, 7, state=state))).skipped_in_row == skipped


def test_a_run_whose_last_steps_were_all_skipped_is_not_done(tmp_path: Path) -> None:
    config = small_run(tmp_path)
    assert "no progress since step 5: the last 7 steps were skipped" in given_up(config, destroyed_at=5)
    assert saved(config)[0] == 12


def test_a_resumed_run_whose_new_steps_were_all_skipped_is_not_done(tmp_path: Path) -> None:
    first = small_run(tmp_path, train={"steps": 8})
    assert train_here(first, inject(DESTROYED, first, 8)) == 0
    assert "no progress since step 8: the last 4 steps were skipped" in given_up(small_run(tmp_path))


def test_skipped_steps_count_over_a_stop_in_between(tmp_path: Path) -> None:
    config = small_run(tmp_path)

    class StopAt(StopSignal):
        @property
        def requested(self) -> bool:
            return rows_of(config)[-1]["step"] == 11

    assert train_here(config, inject(DESTROYED, config, 9), StopAt()) == 75
    assert "no progress since step 9: the last 3 steps were skipped" in given_up(config)


def test_a_long_run_does_not_go_on_to_its_end(tmp_path: Path) -> None:
    config = small_run(tmp_path, train={"steps": 400}, health={"max_skipped_steps": 10, "rerun": False})
    said = given_up(config, destroyed_at=5)
    assert "no progress since step 5: the last 10 steps were skipped" in said
    assert "health.max_skipped_steps = 10" in said
    assert rows_of(config)[-1]["step"] == 15
    assert "since step 5: the last 10 steps" in given_up(config)


def test_a_skipped_step_at_the_end_is_said_and_no_failure(tmp_path: Path) -> None:
    config = small_run(tmp_path)
    assert train_here(config, inject(DESTROYED, config, 10)) == 0
    status = read_status(config.run_dir)
    assert status is not None and status.status == "done"
    assert status.message == ("no progress since step 10: the last 2 steps were skipped, as no gradient was finite")


def test_counts() -> None:
    limit = StallLimit(4, "fp32")
    state = TrainState()
    for skipped in (True, False, True, True, True):
        state = state.advanced(8, 100, 512, skipped=skipped)
        limit.require_progress(state)
    assert state.skipped_in_row == 3
    assert TrainState.from_json(json.loads(json.dumps(state.to_json())), {}) == state
    with pytest.raises(NoProgressError, match="older checkpoint"):
        limit.require_progress(state.advanced(8, 100, 512, skipped=True))
    StallLimit(0, "fp32").require_progress(state.advanced(8, 100, 512, skipped=True))
    limit.require_result(TrainState())
    assert skipped_text(TrainState(step=3)) == ""


def test_a_drill_does_not_begin_with_such_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every fault would be found to leave the weights of the undisturbed run."""

    def launched(resolved: ResolvedRun, change_run: object) -> int:
        return train_here(resolved.config, inject(DESTROYED, resolved.config, 5))

    monkeypatch.setattr("llmtrain.checks.drill.single_faults.launch", launched)
    with pytest.raises(LlmtrainError, match=r"undisturbed run ended with 93 \(.*no progress since step 5: the last 25"):
        undisturbed(drill_config(small_run(tmp_path)))
