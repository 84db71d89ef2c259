"""What follows the end of an attempt, decided without a process."""

from dataclasses import replace
from pathlib import Path

import pytest

from launch.rank.failure import Failure
from launch.supervision.restarts import AttemptEnd, Decision, decide, num_stalled, supervise
from llmtrain.checkpoint.folders import CHECKPOINTS, step_folder_name
from llmtrain.config.reading.load import load_config
from llmtrain.config.schema import RunConfig
from llmtrain.errors import DataError, LaunchError, SaveError
from llmtrain.runs.audit import iter_events
from llmtrain.runs.folder import RunFolder
from llmtrain.runs.status import read_status
from tests.support.run_files import write_good_run

DEFECT = Failure.of_error(1, ValueError("spoiled on purpose"))
KILLED = Failure.of_exit(1, -9)
DAMAGE = Failure.of_error(0, DataError("shard-000007.tar: damaged"))


def failed(failure: Failure = DEFECT, saved: int = 0, worked: bool = True) -> AttemptEnd:
    return AttemptEnd(failure.exit_code, (failure,), saved_step=saved, step=saved + 2, worked=worked)


@pytest.mark.parametrize("exit_code", [0, 75])
def test_a_wanted_end_is_the_end(exit_code: int) -> None:
    assert decide([AttemptEnd(exit_code)], 3) == Decision("stop", exit_code)


def test_another_number_of_ranks_is_no_end_and_no_standstill() -> None:
    resized = AttemptEnd(75, saved_step=5, worked=True, resized=True)
    assert decide([resized], 3).action == "restart"
    assert num_stalled([failed(saved=5), resized, failed(saved=5)]) == 1
    assert num_stalled([failed(saved=5), replace(failed(saved=5), resized=True)]) == 1


@pytest.mark.parametrize("failure", [DEFECT, KILLED])
def test_what_worked_is_started_again(failure: Failure) -> None:
    assert decide([failed(failure, saved=5)], 3).action == "restart"


def test_a_run_that_never_worked_is_not_started_again() -> None:
    decision = decide([failed(DEFECT, worked=False)], 3)
    assert (decision.action, decision.exit_code) == ("stop", 1)
    assert decide([failed(KILLED, worked=False)], 3).action == "restart"
    assert decide([failed(saved=5), failed(DEFECT, saved=5, worked=False)], 3).action == "restart"


def test_what_a_person_must_mend_is_not_started_again() -> None:
    decision = decide([failed(DAMAGE, saved=5)], 3)
    assert (decision.action, decision.exit_code) == ("stop", 3)


def test_a_last_save_that_failed_is_not_trained_for_again() -> None:
    decision = decide([failed(Failure.of_error(0, SaveError("runs/x: no space left")), saved=5)], 3)
    assert (decision.action, decision.exit_code) == ("stop", 1)
    assert decide([failed(Failure.of_error(0, LaunchError("the store is gone")), saved=5)], 3).action == "restart"


@pytest.mark.parametrize("failure", [DEFECT, KILLED])
def test_told_to_stop_what_would_be_started_again_asks_for_it(failure: Failure) -> None:
    """A rank that hangs or dies while the run is told to stop: a scheduler requeues 75, and not 1."""
    assert decide([replace(failed(failure, saved=5), told_to_stop=True)], 3) == Decision("stop", 75, "told to stop")


def test_told_to_stop_what_would_end_ends_as_it_would() -> None:
    lasting = Failure.of_error(0, SaveError("runs/x: no space left"))
    assert decide([replace(failed(lasting, saved=5), told_to_stop=True)], 3).exit_code == 1
    assert decide([replace(failed(DAMAGE), told_to_stop=True)], 3).exit_code == 3
    assert decide([replace(failed(DEFECT, worked=False), told_to_stop=True)], 3).exit_code == 1
    assert decide([failed(), failed(), replace(failed(), told_to_stop=True)], 3).exit_code == 93


def test_told_twice_is_told_twice() -> None:
    twice = Failure.of_exit(0, 143)
    assert decide([failed(twice, saved=5)], 3) == Decision("stop", 143, "told to stop")


def test_none_is_started_again_where_the_configuration_says_so() -> None:
    assert decide([failed(saved=5)], 0).action == "stop"


@pytest.mark.parametrize("saved_before", [0, 10])
def test_attempts_without_a_newer_checkpoint_end_with_93(saved_before: int) -> None:
    attempts: list[AttemptEnd] = []
    for _ in range(2):
        attempts.append(failed(saved=saved_before))
        assert decide(attempts, 3, saved_before).action == "restart"
    decision = decide([*attempts, failed(saved=saved_before)], 3, saved_before)
    assert (decision.action, decision.exit_code) == ("stop", 93)
    assert "3 attempts in a row ended without a newer checkpoint" in decision.reason


def test_a_newer_checkpoint_is_progress_and_an_older_one_is_not() -> None:
    assert num_stalled([failed(saved=step) for step in (5, 5, 10)]) == 0
    assert num_stalled([failed(saved=step) for step in (5, 10, 10, 10)]) == 2
    # A damaged newest checkpoint is set aside and written again: that is no progress.
    assert num_stalled([failed(saved=step) for step in (10, 5, 10)]) == 2


def run_config(folder: Path) -> RunConfig:
    return load_config(write_good_run(folder), [f"output_dir={folder / 'runs'}"]).config


def folder_of(config: RunConfig, step: int) -> Path:
    run = config.run_dir
    (run / CHECKPOINTS / step_folder_name(step)).mkdir(parents=True)
    with RunFolder(run) as folder:
        folder.write_status("running", step + 1, 20, "training")
    return run


def test_what_happened_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = run_config(tmp_path)
    run = folder_of(config, 5)
    ends = iter([failed(KILLED, saved=5), AttemptEnd(0, saved_step=20, step=20, worked=True)])
    statuses = []

    def run_attempt(number: int) -> AttemptEnd:
        statuses.append(read_status(run))
        return next(ends)

    assert supervise(config, run_attempt) == 0
    told = capsys.readouterr().err
    assert "was killed by SIGKILL" in told
    assert "starting again (attempt 2), from the checkpoint of step 5" in told
    between = statuses[1]
    assert between is not None
    assert (between.status, between.step, between.attempt) == ("restarting", 7, 0)
    assert "was killed by SIGKILL" in between.cause and "started again" in between.next_action
    event = next(iter_events(run))
    assert (event["event"], event["rank"], event["step"], event["saved_step"]) == ("restarting", 1, 7, 5)


def test_giving_up_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = run_config(tmp_path)
    run = folder_of(config, 5)
    assert supervise(config, lambda number: failed(saved=5)) == 93
    assert "given up: 3 attempts in a row ended without a newer checkpoint" in capsys.readouterr().err
    status = read_status(run)
    assert status is not None and status.status == "stalled" and "spoiled on purpose" in status.cause
    assert [event["event"] for event in iter_events(run)] == ["restarting", "restarting", "stalled"]


def test_a_stop_that_could_not_save_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = run_config(tmp_path)
    run = folder_of(config, 5)
    hung = replace(failed(KILLED, saved=5), told_to_stop=True)
    assert supervise(config, lambda number: hung) == 75
    told = capsys.readouterr().err
    assert "was killed by SIGKILL" in told
    assert "told to stop, and not saved: the same command continues from the checkpoint of step 5" in told
    status = read_status(run)
    assert status is not None and status.status == "preempted" and "SIGKILL" in status.cause
    assert "start the same command again" in status.next_action
    assert [event["event"] for event in iter_events(run)] == ["preempted"]


def test_a_stop_that_can_never_save_is_not_asked_for_for_ever(tmp_path: Path) -> None:
    """With checkpoint.every_steps=0 the last save is the only one: a defect in it comes again after every requeue."""
    config = run_config(tmp_path)
    run = folder_of(config, 5)
    hopeless = replace(failed(saved=5), told_to_stop=True)
    assert [supervise(config, lambda number: hopeless) for _ in range(3)] == [75, 75, 93]
    status = read_status(run)
    assert status is not None and status.status == "stalled" and "3 attempts in a row" in status.message
    # One that has saved something meanwhile has not come to a standstill.
    assert supervise(config, lambda number: replace(failed(saved=9), told_to_stop=True)) == 75
