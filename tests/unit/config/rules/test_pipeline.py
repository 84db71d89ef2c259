"""Rules between the keys of a data pipeline: who does the work, and what a job of Slurm needs."""

from typing import Any

import pytest

from llmtrain.config.pipelines.schema import PipelineConfig
from llmtrain.config.rules.pipeline import pipeline_problems, slurm_job_problems


def pipeline(**run: Any) -> PipelineConfig:
    return PipelineConfig.model_validate({"name": "x", "read": [{"path": "a"}], "run": run})


def problems(**run: Any) -> dict[str, str]:
    return {problem.key: problem.message for problem in pipeline_problems(pipeline(**run))}


def job_problems(**run: Any) -> dict[str, str]:
    return {problem.key: problem.message for problem in slurm_job_problems(pipeline(**run).run)}


@pytest.mark.parametrize(("key", "value"), [("address", "h:1"), ("allow_open_cluster", True)])
def test_what_is_for_ray_only(key: str, value: Any) -> None:
    assert "is for Ray, and run.backend is processes" in problems(**{key: value})[f"run.{key}"]
    assert problems(**{key: value}, backend="ray") == {}


@pytest.mark.parametrize("path", ["https://me:canary@h/a.jsonl", "s3://canary@b/a", "http://h/a.jsonl?sig=canary"])
def test_credentials_are_not_written_into_a_plan(path: str) -> None:
    config = PipelineConfig.model_validate({"name": "x", "read": [{"path": path}]})
    (problem,) = pipeline_problems(config)
    assert problem.key == "read.0.path" and "would stand in plan.json" in problem.message
    assert "canary" not in str(problem)


@pytest.mark.parametrize("path", ["s3://b/part-?.jsonl", "https://h/a.jsonl", "me@home/a.txt", "http://[x"])
def test_patterns_and_paths_hold_no_credentials(path: str) -> None:
    assert pipeline_problems(PipelineConfig.model_validate({"name": "x", "read": [{"path": path}]})) == []


@pytest.mark.parametrize("address", ["http://h:8265", "h", "ray://h:1", ""])
def test_addresses_are_those_of_heads(address: str) -> None:
    assert "must be host:port of the cluster's head" in problems(backend="ray", address=address)["run.address"]
    assert problems(backend="ray", address="auto") == problems(backend="ray", address="10.0.0.1:6379") == {}


def test_processes_work_on_one_machine() -> None:
    assert problems(slurm={"nodes": 2}) == {
        "run.slurm.nodes": "must be 1: processes work on one machine. Try 1, or run.backend=ray, whose tasks work on "
        "all."
    }
    assert problems(slurm={"nodes": 2}, backend="ray") == {}


@pytest.mark.parametrize(
    ("grace", "warn", "says"),
    [
        (120.0, 120, "must be less than run.slurm.warn_seconds = 120, and not 0"),
        (0.0, 120, "Try 60, or a larger run.slurm.warn_seconds."),
        (60.0, 30, "Try 15"),
        (60.0, 1, "is not requeued."),
    ],
)
def test_a_job_has_stopped_before_its_time_is_up(grace: float, warn: int, says: str) -> None:
    found = job_problems(grace_seconds=grace, slurm={"warn_seconds": warn})
    assert list(found) == ["run.grace_seconds"] and says in found["run.grace_seconds"]
    assert problems(grace_seconds=grace, slurm={"warn_seconds": warn}) == {}, "elsewhere it does not matter"


def test_tasks_are_spread_evenly_over_machines() -> None:
    found = job_problems(backend="ray", workers=7, slurm={"nodes": 2})
    assert list(found) == ["run.workers"] and found["run.workers"].endswith("Try 6 or 8.")
    for workers in (0, 2, 8):
        assert job_problems(backend="ray", workers=workers, slurm={"nodes": 2}) == {}
    assert job_problems() == {}, "the defaults fit"
