import math
import os
import sys
import threading
import time
from pathlib import Path

import pytest
import wandb
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from llmtrain.config.schema import RunConfig
from llmtrain.observe import background
from llmtrain.observe.background import BackgroundTracker
from llmtrain.observe.console import ConsoleTracker
from llmtrain.observe.jsonl import read_rows
from llmtrain.observe.scalars import scalars
from llmtrain.observe.tensorboard_tracker import TensorBoardTracker
from llmtrain.observe.trackers import build_trackers
from llmtrain.observe.wandb_tracker import WandbRun, WandbTracker
from tests.unit.observe.wandb_file import history, iter_records

CANARY = "canary-hf-0123456789"


def run_config(**observe) -> RunConfig:
    data = {"name": "tiny", "model": {}, "data": {"train": [{"path": "x"}]}, "train": {"steps": 3}, "observe": observe}
    return RunConfig.model_validate(data)


def wandb_file(run_dir: Path) -> Path:
    (path,) = run_dir.glob("wandb/offline-run-*/run-*.wandb")
    return path


def test_chart_names():
    row = {"step": 3, "loss": 1.5, "valid_loss": 2, "skipped": True, "note": "text"}
    assert scalars(row) == {"train/loss": 1.5, "valid/loss": 2.0, "train/skipped": 1.0}


def test_tensorboard_holds_the_values_and_hides_what_a_resume_replaced(tmp_path: Path):
    for start, steps in ((0, range(1, 8)), (4, range(5, 7))):
        tracker = TensorBoardTracker(tmp_path, start)
        for step in steps:
            tracker.log({"step": step, "loss": step + start / 10})
        tracker.close("done")
        time.sleep(1.1)  # event files are named by the second, and the reader follows their names
    events = EventAccumulator(str(tmp_path)).Reload().Scalars("train/loss")
    assert [(event.step, round(event.value, 4)) for event in events] == [
        (1, 1),
        (2, 2),
        (3, 3),
        (4, 4),
        (5, 5.4),
        (6, 6.4),
    ]


def test_wandb_writes_the_rows_and_nothing_of_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "argv", [*sys.argv, f"--hf_token={CANARY}"])
    monkeypatch.setenv("HF_TOKEN", CANARY)
    rows = [
        {"step": 21, "loss": 0.1 + 0.2, "lr": 3e-4},
        {"step": 22, "valid_loss": 1 / 3},
        {"step": 23, "loss": math.inf},
    ]
    tracker = WandbTracker(WandbRun("tiny", "project", "offline", 20), tmp_path, {"optim": {"lr": 3e-4}})
    for row in rows:
        tracker.log(row)
    time.sleep(1)  # the time in which it would look at the machine
    tracker.close("preempted")

    logged = history(wandb_file(tmp_path))
    assert logged[0] == {"train/step": 21, "train/loss": 0.1 + 0.2, "train/lr": 3e-4}
    assert logged[1] == {"train/step": 22, "valid/loss": 1 / 3}
    assert logged[2]["train/step"] == 23
    records = list(iter_records(wandb_file(tmp_path)))
    run = next(record.run for record in records if record.HasField("run"))
    assert (run.run_group, run.project, run.display_name) == ("tiny", "project", "tiny from step 20")
    assert [item.value_json for item in run.config.update if item.key == "optim"] == ['{"lr":0.0003}']
    assert next(record.exit.exit_code for record in records if record.HasField("exit")) == 0
    assert any(record.metric.glob_name == "*" and record.metric.step_metric == "train/step" for record in records)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files
    for path in files:
        content = path.read_bytes()
        assert CANARY.encode() not in content, path
        assert os.environ["PATH"].encode() not in content, path
    assert not list(tmp_path.rglob("wandb-metadata.json"))
    assert not list(tmp_path.rglob("requirements.txt"))


def test_without_those_settings_the_command_line_would_be_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    private_settings = wandb.Settings
    open_to_all = {"x_disable_meta": False, "x_disable_machine_info": False, "x_transaction_log_flush_interval": 0.1}
    monkeypatch.setattr(sys, "argv", [*sys.argv, f"--hf_token={CANARY}"])
    monkeypatch.setattr(wandb, "Settings", lambda **given: private_settings(**{**given, **open_to_all}))
    tracker = WandbTracker(WandbRun("tiny", "project", "offline"), tmp_path, {})

    def found() -> bool:
        return any(CANARY.encode() in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())

    bound = time.monotonic() + 60  # W&B looks at the machine some time after the start
    while not found() and time.monotonic() < bound:
        time.sleep(0.05)
    tracker.close("done")
    assert found()


def test_a_folder_that_wandb_cannot_write_warns_once_and_training_goes_on(tmp_path: Path):
    (tmp_path / "wandb").write_text("a file, where a folder is needed")
    said: list[str] = []
    run = WandbRun("tiny", "project", "offline")
    tracker = BackgroundTracker("Weights & Biases", lambda: WandbTracker(run, tmp_path, {}), said.append)
    for step in range(1, 50):
        tracker.log({"step": step, "loss": 1.0})
    tracker.flush()
    tracker.close("done")
    assert len(said) == 1
    assert "Weights & Biases is off" in said[0]
    assert "wandb" in said[0]


def test_online_without_a_login_warns_and_asks_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("wandb.login", lambda **_: False)
    with pytest.raises(RuntimeError, match=r"observe\.wandb=offline"):
        WandbTracker(WandbRun("tiny", "project", "online"), tmp_path, {})


class SlowTracker:
    def __init__(self, gate: threading.Event) -> None:
        gate.wait()
        self.seen: list[int] = []
        self.status = ""

    def log(self, row) -> None:
        self.seen.append(row["step"])

    def flush(self) -> None: ...

    def close(self, status: str) -> None:
        self.status = status


def test_rows_wait_for_a_tracker_that_starts_slowly_and_hold_nothing_up(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(background, "FLUSH_SECONDS", 0.01)
    gate, built = threading.Event(), []

    def build() -> SlowTracker:
        built.append(SlowTracker(gate))
        return built[0]

    tracker = BackgroundTracker("slow", build, lambda text: pytest.fail(text))
    for step in range(100):
        tracker.log({"step": step})
    tracker.flush()
    assert not built, "the rows came before the tracker"
    gate.set()
    tracker.close("done")
    assert built[0].seen == list(range(100))
    assert built[0].status == "done"


def test_a_tracker_that_never_ends_is_left_behind_with_a_word(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(background, "CLOSE_SECONDS", 0.05)
    gate, said = threading.Event(), []
    tracker = BackgroundTracker("slow", lambda: SlowTracker(gate), said.append)
    tracker.close("done")
    gate.set()
    assert len(said) == 1
    assert "did not finish" in said[0]


def test_the_configuration_chooses_and_all_trackers_hold_the_same(tmp_path: Path):
    console = ConsoleTracker("tiny", 0, 3)
    trackers = build_trackers(run_config(wandb="offline", tensorboard=True), tmp_path, 0, console)
    for step in (1, 2, 3):
        for tracker in trackers:
            tracker.log({"step": step, "loss": 1 / step})
    for tracker in trackers:
        tracker.flush()
        tracker.close("done")
    expected = {1: 1.0, 2: 0.5, 3: 1 / 3}
    assert {row["step"]: row["loss"] for row in read_rows(tmp_path / "metrics.jsonl")} == expected
    assert {row["train/step"]: row["train/loss"] for row in history(wandb_file(tmp_path))} == expected
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("train/loss")
    assert {event.step: event.value for event in events} == pytest.approx(expected)


def test_only_the_file_is_written_where_the_rest_is_off(tmp_path: Path):
    trackers = build_trackers(run_config(wandb="off", tensorboard=False), tmp_path, 0, ConsoleTracker("tiny", 0, 3))
    assert len(trackers) == 1
    trackers[0].close("done")
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
