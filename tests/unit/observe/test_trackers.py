import json
import math
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import wandb
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from llmtrain.config.schema import RunConfig
from llmtrain.observe import trackers as tracker_module
from llmtrain.observe.charts import CHART_NAMES, NO_METRICS, TensorBoardTracker, chart_name, scalars
from llmtrain.observe.console import ConsoleTracker
from llmtrain.observe.monitor import Monitor, RunPlan
from llmtrain.observe.trackers import BackgroundTracker, build_trackers
from llmtrain.observe.wandb_tracker import WandbRun, WandbTracker
from llmtrain.parallel.layout import Layout
from llmtrain.runs.audit import StartedAttempt
from llmtrain.runs.metrics_file import read_rows
from llmtrain.values.progress import StepResult
from tests.unit.observe.wandb_file import history, iter_records

CANARY = "canary-hf-0123456789"


def run_config(**observe) -> RunConfig:
    data = {
        "name": "tiny",
        "model": {"vocab_size": 300},
        "data": {"train": [{"path": "x"}]},
        "train": {"steps": 3},
        "observe": observe,
    }
    return RunConfig.model_validate(data)


def wandb_file(run_dir: Path) -> Path:
    (path,) = run_dir.glob("wandb/offline-run-*/run-*.wandb")
    return path


def test_chart_names():
    row = {"step": 3, "time": 1e9, "resumed_from": 2, "loss": 1.5, "valid_loss": 2, "skipped": True, "note": "text"}
    assert scalars(row) == {"train/loss": 1.5, "valid/loss": 2.0, "train/skipped_steps": 1.0}
    measured = {"mfu": 0.4, "memory_bytes": 7, "system_cpu_percent": 50.0}
    assert scalars(measured) == {"perf/mfu": 0.4, "memory/peak_bytes": 7.0, "system/cpu_percent": 50.0}


def test_metrics_that_nobody_has_foreseen_keep_their_group_or_join_those_of_training():
    metrics = {"router_entropy": 1.0, "expert_load/decoder.layers.3": 2.0}
    assert scalars(metrics) == {"train/router_entropy": 1.0, "expert_load/decoder.layers.3": 2.0}


def test_every_column_of_a_row_has_a_chart_that_the_table_names():
    monitor, rows = Monitor(RunPlan(last_step=1, peak_flops=1e9, flops_per_token=1.0)), []
    monitor._record = rows.append  # type: ignore[method-assign]  # what would go to the trackers
    monitor.step(1, 1e-3, StepResult(1.0, 1.0, 10, metrics={"loss_scale": 2.0}))
    monitor.evaluated(1, 1.0, 10)
    monitor.measured(1, {"task/capitals/accuracy": 0.5})
    columns = {column for row in rows for column in row} - set(NO_METRICS)
    assert [column for column in columns if chart_name(column) == f"train/{column}" and column not in CHART_NAMES] == []
    assert set(CHART_NAMES) - columns == {"resident_bytes", "device_allocated_bytes", "device_reserved_bytes"}


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
    run = WandbRun("tiny", "project", "offline", attempt=2, resume_step=20, run_id="cafe0123")
    tracker = WandbTracker(run, tmp_path, {"optim": {"lr": 3e-4}})
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
    assert (run.run_group, run.project, run.display_name) == ("tiny", "project", "tiny attempt 2 from step 20")
    assert run.run_id == "tiny-cafe0123-002"
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


def offline_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **environment: str) -> list[str]:
    """Log a row in online mode; returns what was said."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    said: list[str] = []
    tracker = WandbTracker(WandbRun("tiny", "project", "online", run_id="cafe"), tmp_path, {}, said.append)
    tracker.log({"step": 1, "loss": 0.5})
    tracker.close("done")
    assert history(wandb_file(tmp_path)) == [{"train/step": 1, "train/loss": 0.5}]
    assert len(list((tmp_path / "wandb").glob("*run-*-tiny-cafe-001"))) == 1, "nothing but the offline run is left"
    return said


def test_online_without_a_login_stays_offline_and_asks_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
):
    monkeypatch.setattr("wandb.login", lambda **_: False)
    (said,) = offline_after(tmp_path, monkeypatch)
    assert "not logged in: run `wandb login`" in said and f"wandb sync {tmp_path}/wandb/offline-*" in said
    assert capfd.readouterr() == ("", "")


def test_a_server_that_cannot_be_reached_leaves_the_run_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
):
    monkeypatch.setattr("llmtrain.observe.wandb_tracker.ONLINE_SECONDS", 1.0)
    (said,) = offline_after(tmp_path, monkeypatch, WANDB_BASE_URL="http://127.0.0.1:9", WANDB_API_KEY="a" * 40)
    assert "stays offline" in said and "wandb sync" in said and "\n" not in said
    assert capfd.readouterr() == ("", "")


def test_the_last_checkpoint_is_an_artifact_only_where_it_is_asked_for_and_the_run_is_done(tmp_path: Path):
    checkpoint = tmp_path / "step-00000003"
    checkpoint.mkdir()
    (checkpoint / "manifest.json").write_text("{}")
    for name, status, wanted, expected in (
        ("done", "done", lambda: checkpoint, ["manifest.json"]),
        ("failed", "failed", lambda: checkpoint, []),
        ("never-saved", "done", lambda: None, []),
        ("not-wanted", "done", None, []),
    ):
        run_dir = tmp_path / name
        tracker = WandbTracker(WandbRun("tiny", "project", "offline"), run_dir, {}, final_checkpoint=wanted)
        tracker.log({"step": 1, "loss": 0.5})
        tracker.close(status)
        artifacts = [record.artifact for record in iter_records(wandb_file(run_dir)) if record.HasField("artifact")]
        assert [entry.path for artifact in artifacts for entry in artifact.manifest.contents] == expected
        for artifact in artifacts:
            assert (artifact.type, artifact.name) == ("model", "tiny-checkpoint")
            assert {"final", "step-00000003"} <= set(artifact.aliases)
            assert [entry.local_path for entry in artifact.manifest.contents] == [str(checkpoint / "manifest.json")]


def test_the_configuration_goes_out_without_credentials_and_with_what_the_run_is(tmp_path: Path):
    config = run_config(wandb="offline", tensorboard=False)
    url = f"https://user:{CANARY}@example.org/a?X-Signature={CANARY}"
    config = config.with_keys({"data.train": [{"path": url}]})
    trackers = build_trackers(config, Layout(), tmp_path, StartedAttempt(3, "cafe", 7), ConsoleTracker("tiny", 7, 9))
    for tracker in trackers:
        tracker.log({"step": 8, "loss": 1.0})
        tracker.close("done")
    records = list(iter_records(wandb_file(tmp_path)))
    updates = {item.key: item.value_json for record in records for item in record.run.config.update}
    assert json.loads(updates["data"])["train"][0]["path"] == "https://example.org/a"
    about = json.loads(updates["run"])
    assert (about["attempt"], about["resumed_from_step"], about["world_size"]) == (3, 7, 1)
    assert about["layout"]["data"] == 1 and about["parameters"] > 1000 and about["llmtrain_version"]
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or CANARY.encode() not in path.read_bytes(), path


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
    monkeypatch.setattr(tracker_module, "FLUSH_SECONDS", 0.01)
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
    monkeypatch.setattr(tracker_module, "CLOSE_SECONDS", 0.05)
    gate, said = threading.Event(), []
    tracker = BackgroundTracker("slow", lambda: SlowTracker(gate), said.append)
    tracker.close("done")
    gate.set()
    assert len(said) == 1
    assert "did not finish" in said[0]


def test_the_configuration_chooses_and_all_trackers_hold_the_same(tmp_path: Path):
    console = ConsoleTracker("tiny", 0, 3)
    trackers = build_trackers(
        run_config(wandb="offline", tensorboard=True), Layout(), tmp_path, StartedAttempt(), console
    )
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


def test_the_summary_of_an_attempt_begins_with_what_the_run_had_before(tmp_path: Path):
    """An attempt that ends before its first evaluation has the one of the run up to it; not one that it replaces."""
    rows = [{"step": 1, "loss": 5.0}, {"step": 2, "loss": 4.0}, {"step": 2, "valid_loss": 4.5}]
    replaced = [{"step": 3, "loss": 3.0}, {"step": 3, "valid_loss": 3.5}]
    timed = {"time": 1.0, "step_seconds": 1.0, "tokens_per_second": 1.0}
    lines = (json.dumps({**timed, **row}) + "\n" for row in (*rows, *replaced))
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    console = ConsoleTracker("tiny", 2, 4)
    config, attempt = run_config(wandb="offline", tensorboard=False), StartedAttempt(number=2, step=2)
    trackers = build_trackers(config, Layout(), tmp_path, attempt, console)
    for tracker in trackers:
        tracker.log({"step": 3, "loss": 2.0})
        tracker.close("done")
    summary: dict[str, object] = {}
    for record in iter_records(wandb_file(tmp_path)):
        for item in record.summary.update if record.HasField("summary") else ():
            summary["/".join(item.nested_key) or item.key] = json.loads(item.value_json)
    assert (summary["valid/loss"], summary["train/loss"]) == (4.5, 2.0)
    assert history(wandb_file(tmp_path)) == [{"train/step": 3, "train/loss": 2.0}]


def test_only_the_file_is_written_where_the_rest_is_off(tmp_path: Path):
    trackers = build_trackers(
        run_config(wandb="off", tensorboard=False), Layout(), tmp_path, StartedAttempt(), ConsoleTracker("tiny", 0, 3)
    )
    assert len(trackers) == 1
    trackers[0].close("done")
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_names_of_charts_need_no_tensorboard() -> None:
    """Weights & Biases shows the same charts, and must not go down with TensorBoard."""
    code = "import sys, llmtrain.observe.charts; sys.exit(any('tensorboard' in name for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], timeout=300, check=False).returncode == 0
