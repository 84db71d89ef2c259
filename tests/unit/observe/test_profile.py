"""The profiler traces the wanted steps, whole, once, and never stops a run."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llmtrain.observe import profile
from llmtrain.observe.monitor import Monitor, RunPlan
from llmtrain.observe.profile import Profiler
from llmtrain.values.progress import StepResult


def train(steps: range, window: tuple[int, int], folder: Path, last_step: int = 9) -> tuple[list, list[str]]:
    """Go through a loop's calls of the monitor; returns the phases heard and what was said."""
    heard, said = [], []
    profiler = Profiler(lambda *place: heard.append(place), window, folder / "profile" / "rank-00000", said.append)
    monitor = Monitor(RunPlan(last_step=last_step, start_step=steps[0] - 1), on_phase=profiler)
    for step in steps:
        with monitor.phase("data"):
            torch.arange(step + 100)
        torch.ones(step, step) @ torch.ones(step, step)
        monitor.step(step, 1e-3, StepResult(1.0, 1.0, 10))
        if step == 3:
            with monitor.phase("evaluate"):
                torch.zeros(5).sin()
    return heard, said


def events(path: Path) -> list[dict]:
    return json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "profile").glob("*"))


def test_the_wanted_steps_are_traced_and_no_others(tmp_path: Path) -> None:
    heard, said = train(range(1, 8), (3, 4), tmp_path)
    stem = "rank-00000-steps-00000003-00000004"
    assert files(tmp_path) == [f"{stem}.json.gz", f"{stem}.txt"]
    trace = events(tmp_path / "profile" / f"{stem}.json.gz")
    shapes = [event["args"]["Input Dims"][0] for event in trace if event.get("name") == "aten::mm"]
    assert shapes == [[3, 3], [4, 4]]
    names = [event["name"] for event in trace if event.get("cat") == "user_annotation" and " step " in event["name"]]
    parts = ["data of step 3", "work of step 3", "evaluate after step 3", "data of step 4", "work of step 4"]
    assert sorted(set(names)) == sorted(parts)
    assert "aten::mm" in (tmp_path / "profile" / f"{stem}.txt").read_text()
    assert said == [f"traced steps 3 to 4: {tmp_path}/profile/{stem}.json.gz"]
    plain, _ = train(range(1, 8), (9, 9), tmp_path / "other")
    assert heard == plain, "who listens behind the profiler hears the same"


@pytest.mark.parametrize(("first", "traced"), [(2, "3-00000004"), (4, "4-00000004"), (5, ""), (8, "")])
def test_a_resume_traces_what_is_left_of_the_window(tmp_path: Path, first: int, traced: str) -> None:
    train(range(first, 9), (3, 4), tmp_path)
    stem = f"rank-00000-steps-0000000{traced}"
    assert files(tmp_path) == ([f"{stem}.json.gz", f"{stem}.txt"] if traced else [])


def test_the_first_step_can_be_traced(tmp_path: Path) -> None:
    train(range(1, 4), (1, 1), tmp_path)
    (path,) = (tmp_path / "profile").glob("*.json.gz")
    assert any(event.get("name") == "work of step 1" for event in events(path))


def test_a_run_that_goes_back_is_traced_once(tmp_path: Path) -> None:
    heard: list = []
    profiler = Profiler(lambda *place: heard.append(place), (2, 2), tmp_path / "profile" / "r", lambda text: None)
    for step in (1, 2, 3, 1, 2, 3):
        profiler("data", step - 1)
        profiler("step", step)
    assert len(files(tmp_path)) == 2
    assert len(heard) == 12


def failing(*arguments: object, **options: object) -> object:
    raise RuntimeError("Can't disable Kineto profiler when it's not running")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder, patch: (folder / "profile").write_text("a file, where a folder is needed"),
        lambda folder, patch: patch.setattr(profile, "profile", failing),
        lambda folder, patch: patch.setattr(profile.profile, "key_averages", failing),
    ],
)
def test_a_trace_that_cannot_be_made_or_written_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: Callable
) -> None:
    spoil(tmp_path, monkeypatch)
    heard, said = train(range(1, 6), (2, 3), tmp_path)
    assert len(said) == 1
    assert "observe.profile" in said[0] and "Training goes on" in said[0]
    assert heard[-1] == ("step", 5)
