import io
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from rich.console import Console

from llmtrain.observe.charts import scalars
from llmtrain.observe.console import ConsoleTracker
from llmtrain.observe.monitor import Monitor, RunPlan, perplexity
from llmtrain.runs.metrics_file import JsonlTracker, read_rows
from llmtrain.values.progress import SOURCE_TOKENS, Reading


@dataclass(frozen=True)
class Result:
    loss: float = 2.0
    grad_norm: float = 1.0
    num_tokens: int = 100
    skipped: bool = False
    metrics: Mapping[str, float] = field(default_factory=dict)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Recorder:
    def __init__(self) -> None:
        self.rows: list[dict] = []
        self.closed = ""

    def log(self, row) -> None:
        self.rows.append(dict(row))

    def flush(self) -> None: ...

    def close(self, status: str) -> None:
        self.closed = status


class Broken(Recorder):
    def log(self, row) -> None:
        raise OSError("no space left on device")


def plain_console(clock: Clock) -> tuple[ConsoleTracker, io.StringIO]:
    out = io.StringIO()
    console = Console(file=out, force_terminal=False, width=80)
    return ConsoleTracker("run", 0, 10, console, clock), out


def test_step_time_leaves_evaluation_and_checkpoints_out_but_not_waiting_for_data():
    clock, recorder = Clock(), Recorder()
    monitor = Monitor(RunPlan(last_step=2), [recorder], clock=clock)
    for step in (1, 2):
        with monitor.phase("data"):
            clock.now += 0.25
        clock.now += 0.75
        monitor.step(step, 1e-3, Result())
        with monitor.phase("evaluate"):
            clock.now += 50
        monitor.evaluated(step, 2.0, 640)
        with monitor.phase("checkpoint"):
            clock.now += 7
    first, evaluation, second, _ = recorder.rows
    assert first["step_seconds"] == second["step_seconds"] == 1.0
    assert second["data_seconds"] == 0.25
    assert second["tokens_per_second"] == 100.0
    assert (first["checkpoint_seconds"], second["checkpoint_seconds"]) == (0.0, 7.0)
    assert "loss" not in evaluation
    assert evaluation["valid_perplexity"] == pytest.approx(math.e**2)
    assert evaluation["valid_tokens"] == 640
    assert evaluation["valid_seconds"] == 50


def test_rows_average_over_their_interval_and_count_from_the_resumed_state():
    clock, recorder = Clock(), Recorder()
    plan = RunPlan(
        last_step=27, start_step=20, start_tokens=2000, log_every_steps=3, flops_per_token=2.0, peak_flops=400.0
    )
    monitor = Monitor(plan, [recorder], clock=clock)
    for step in range(21, 28):
        clock.now += step
        monitor.step(step, 1e-3, Result(skipped=step in (23, 24), metrics={"loss_scale": 8.0}))
    assert [row["step"] for row in recorder.rows] == [21, 24, 27]
    middle = recorder.rows[1]
    assert middle["step_seconds"] == pytest.approx((22 + 23 + 24) / 3)
    assert middle["tokens_per_second"] == pytest.approx(300 / 69)
    assert middle["mfu"] == pytest.approx(300 / 69 * 2 / 400)
    assert middle["skipped"] == 2
    assert middle["loss_scale"] == 8.0
    assert [row["tokens"] for row in recorder.rows] == [2100, 2400, 2700]


def test_the_first_and_the_last_step_are_recorded_and_mfu_only_with_a_peak():
    recorder = Recorder()
    monitor = Monitor(RunPlan(last_step=7, log_every_steps=5), [recorder])
    for step in range(1, 8):
        monitor.step(step, 1e-3, Result())
    assert [row["step"] for row in recorder.rows] == [1, 5, 7]
    assert "mfu" not in recorder.rows[0]
    assert recorder.rows[0]["memory_bytes"] > 1 << 20


def test_a_broken_tracker_is_named_once_and_the_others_go_on():
    clock, recorder = Clock(), Recorder()
    console, out = plain_console(clock)
    monitor = Monitor(RunPlan(last_step=3), [Broken(), recorder], console, clock)
    for step in (1, 2, 3):
        monitor.step(step, 1e-3, Result())
    monitor.close("done")
    assert out.getvalue().count("no space left on device") == 1
    assert len(recorder.rows) == 3
    assert recorder.closed == "done"


def test_the_values_of_a_skipped_step_reach_the_file(tmp_path: Path):
    monitor = Monitor(RunPlan(last_step=1), [JsonlTracker(tmp_path / "metrics.jsonl")])
    monitor.step(1, 1e-3, Result(loss=math.nan, grad_norm=math.inf, skipped=True))
    monitor.close("done")
    (row,) = read_rows(tmp_path / "metrics.jsonl")
    assert math.isnan(row["loss"])
    assert row["grad_norm"] == math.inf
    assert row["skipped"] == 1


def test_a_run_that_went_back_replaces_what_it_did_since(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    monitor = Monitor(RunPlan(last_step=9, log_every_steps=2), [JsonlTracker(path)])
    for step in range(1, 5):
        monitor.step(step, 1e-3, Result(loss=float(step)))
    monitor.evaluated(5, 0.5, 100)
    monitor.went_back(2, 40)
    monitor.step(3, 1e-3, Result(loss=30.0))
    monitor.step(4, 1e-3, Result(loss=40.0))
    monitor.step(6, 1e-3, Result(loss=60.0))
    monitor.close("done")
    rows = read_rows(path)
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 1.0), (2, 2.0), (4, 40.0), (6, 60.0)]
    assert [row.get("resumed_from") for row in rows] == [None, None, 2, None]
    assert rows[2]["tokens"] == 40 + 2 * Result().num_tokens


def test_going_back_before_the_first_row_of_a_resume_keeps_the_earlier_step(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 20, "loss": 1.0}\n{"step": 40, "loss": 1.0}\n')
    monitor = Monitor(RunPlan(last_step=90, start_step=50), [JsonlTracker(path, 50)])
    monitor.went_back(30, 0)
    monitor.step(31, 1e-3, Result(loss=3.0))
    monitor.close("done")
    assert [row["step"] for row in read_rows(path)] == [20, 31]


def test_a_section_that_fails_is_still_timed():
    clock = Clock()
    recorder = Recorder()
    monitor = Monitor(RunPlan(last_step=1), [recorder], clock=clock)
    with pytest.raises(RuntimeError), monitor.phase("checkpoint"):
        clock.now += 3
        raise RuntimeError
    clock.now += 1
    monitor.step(1, 1e-3, Result())
    assert recorder.rows[0]["step_seconds"] == 1.0


def test_perplexity_of_a_huge_loss_is_infinite():
    assert perplexity(1e4) == math.inf
    assert math.isnan(perplexity(math.nan))


def test_rates_count_the_data_of_a_step_where_targets_are_few() -> None:
    clock, recorder = Clock(), Recorder()
    monitor = Monitor(RunPlan(last_step=1), [recorder], clock=clock)
    clock.now += 2
    monitor.step(1, 0.1, Result(), Reading(800, 8, lambda position: [position * 100]))
    assert (recorder.rows[0]["tokens_per_second"], recorder.rows[0]["tokens"]) == (400.0, Result().num_tokens)
    assert recorder.rows[0]["samples"] == 8 and not any(key.startswith(SOURCE_TOKENS) for key in recorder.rows[0])


def test_a_row_has_the_tokens_of_each_source_where_there_are_several() -> None:
    recorder = Recorder()
    monitor = Monitor(RunPlan(last_step=1, sources=("a", "b")), [recorder])
    monitor.step(1, 0.1, Result(), Reading(800, 8, lambda position: [position * 75, position * 25]))
    columns = {key: value for key, value in recorder.rows[0].items() if key.startswith(SOURCE_TOKENS)}
    assert columns == {f"{SOURCE_TOKENS}a": 600, f"{SOURCE_TOKENS}b": 200}


def test_metrics_of_labels_are_columns_of_evaluations():
    recorder = Recorder()
    monitor = Monitor(RunPlan(last_step=2), [recorder])
    monitor.evaluated(1, 0.5, 20, {"accuracy": 0.75, "entity_f1": 0.5})
    (row,) = recorder.rows
    assert (row["valid_accuracy"], row["valid_entity_f1"], row["valid_tokens"]) == (0.75, 0.5, 20)
    assert "valid_perplexity" not in row
    assert scalars(row)["valid/accuracy"] == 0.75
