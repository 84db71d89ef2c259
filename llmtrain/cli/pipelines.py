"""A data pipeline from the command's side: its file checked, its executor chosen, and what it says when it stops."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from llmtrain.errors import LaunchError, StoppedError

if TYPE_CHECKING:
    from data_pipelines.pipeline.executors import Executor, Stopped
    from llmtrain.config.pipelines.schema import PipelineConfig


def checked_pipeline(path: Path, overrides: Sequence[str]) -> "PipelineConfig":
    """The configuration, once everything that can be known before it reads anything is right. Raises ConfigError."""
    from data_pipelines.pipeline.planning import storage_problems
    from llmtrain.config.reading.pipeline import load_pipeline

    return load_pipeline(path, overrides, storage_problems).config


def run_here(config: "PipelineConfig") -> None:
    """Do the work and say where the result is. Told to stop, it ends what is under way, and the process with 75."""
    from data_pipelines.pipeline.progress import Progress
    from data_pipelines.pipeline.run import run_pipeline
    from launch.rank.signals import StopSignal, exit_after_grace

    progress = Progress()
    try:
        with StopSignal("finishing what is under way, then stopping", "and what is under way is lost") as stop:
            exit_after_grace(stop, config.run.grace_seconds, "not finished within run.grace_seconds")
            with _executor(config, lambda: stop.requested) as executor:
                folder = run_pipeline(config, executor, progress)
    except StoppedError as stopped:
        typer.echo(str(stopped), err=True)
        raise typer.Exit(stopped.exit_code) from None
    progress.say(f"{folder}: report.html shows what was kept and dropped, summary.json has the counts")


@contextmanager
def _executor(config: "PipelineConfig", stopped: "Stopped") -> Iterator["Executor"]:
    """Processes of this machine, or the tasks of a Ray cluster."""
    from data_pipelines.pipeline.executors import UntilStopped, executor_of

    run = config.run
    if run.backend == "processes":
        with executor_of(run.workers, stopped) as executor:
            yield executor
        return
    from launch.on_ray.cluster import ray_cluster
    from llmtrain.config.launch import LaunchConfig

    workers = run.workers or os.cpu_count() or 1  # of a Ray of its own; a cluster has its own number
    launch = LaunchConfig(ray_address=run.address, num_workers=workers, allow_open_cluster=run.allow_open_cluster)
    with keys_of_pipelines(), ray_cluster(launch) as cluster:
        from launch.on_ray.task_executor import RayTasks

        yield UntilStopped(RayTasks(cluster, workers if cluster.own else run.workers), stopped)


@contextmanager
def keys_of_pipelines() -> Iterator[None]:
    """Errors about a Ray cluster name the keys of a pipeline: runs have them in another section."""
    try:
        yield
    except LaunchError as error:
        text = str(error).replace("launch.ray_address", "run.address")
        raise LaunchError(text.replace("launch.allow_open_cluster", "run.allow_open_cluster")) from None
