"""`llmtrain submit`: check a configuration completely, then hand the run, or the pipeline, over to Ray or Slurm."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from llmtrain.cli.train import OverridesArgument

if TYPE_CHECKING:
    from launch.on_ray.job_plan import JobPlan
    from launch.on_ray.jobs import JobServer
    from llmtrain.config.schema import RunConfig

ConfigArgument = Annotated[
    Path, typer.Argument(help="The YAML file of a run or of a data pipeline.", metavar="CONFIG", show_default=False)
]

LOOKS = ("--status", "--logs", "--stop")
"""Options that submit nothing."""


def submit(
    config: ConfigArgument,
    to: Annotated[Literal["ray", "slurm"], typer.Option("--to", help="Who runs it.", show_default=False)],
    overrides: OverridesArgument = None,
    address: Annotated[
        str | None,
        typer.Option(help="Ray's dashboard. [default: RAY_API_SERVER_ADDRESS or http://127.0.0.1:8265]"),
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", help="Show the job's log, and end with its exit code.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be submitted, and stop.")] = False,
    status: Annotated[bool, typer.Option("--status", help="Say how the newest job is.")] = False,
    logs: Annotated[bool, typer.Option("--logs", help="Print the log of the newest job.")] = False,
    stop: Annotated[bool, typer.Option("--stop", help="Let the newest job save and stop, and wait for that.")] = False,
) -> None:
    """Check a configuration as `train` or `data run` does, submit it, and print the job's id.

    The file system is shared: paths mean the same on the machines that run it. Submitted again, it goes on where it
    stopped. --follow, --status, --logs and --stop are for Ray; Slurm has squeue and scancel.
    """
    asked = {"--follow": follow, "--dry-run": dry_run, "--status": status, "--logs": logs, "--stop": stop}
    chosen = [option for option, is_set in asked.items() if is_set]
    if len(chosen) > 1:
        raise typer.BadParameter("only one of them at a time", param_hint=" and ".join(chosen))
    action = chosen[0] if chosen else ""
    if to == "slurm":
        if action not in ("", "--dry-run") or address is not None:
            hint = action if action not in ("", "--dry-run") else "--address"
            raise typer.BadParameter("is for Ray. Slurm has squeue, scancel, and the job's log file", param_hint=hint)
        _to_slurm(config, overrides or [], dry_run)
    else:
        _to_ray(config, overrides or [], address, action)


def _to_slurm(path: Path, overrides: list[str], dry_run: bool) -> None:
    from launch.on_slurm import batch_script
    from llmtrain.cli.pipelines import checked_pipeline
    from llmtrain.config.reading.pipeline import is_pipeline

    config = checked_pipeline(path, overrides) if is_pipeline(path) else _checked(path, overrides)
    if dry_run:
        typer.echo(batch_script.render(config, path, overrides), nl=False)
    else:
        typer.echo(batch_script.submit(config, path, overrides))


def _to_ray(path: Path, overrides: list[str], address: str | None, action: str) -> None:
    from llmtrain.cli.pipelines import keys_of_pipelines
    from llmtrain.config.reading.pipeline import is_pipeline

    looks_only = action in LOOKS
    if is_pipeline(path):
        plan, allow_open = _pipeline_plan(path, overrides, looks_only)
        with keys_of_pipelines():
            _on_server(plan, allow_open, address, action)
    else:
        plan, allow_open = _run_plan(path, overrides, looks_only)
        _on_server(plan, allow_open, address, action)


def _run_plan(path: Path, overrides: list[str], looks_only: bool) -> "tuple[JobPlan, bool]":
    """The job of a run, and whether it may go to a cluster that asks nobody for a token."""
    from launch.on_ray.job_plan import plan_job
    from llmtrain.config.reading.load import load_config

    overrides = [*overrides, "launch.backend=ray"]
    run = load_config(path, overrides).config if looks_only else _checked(path, overrides)
    return plan_job(run, Path.cwd(), os.environ), run.launch.allow_open_cluster


def _pipeline_plan(path: Path, overrides: list[str], looks_only: bool) -> "tuple[JobPlan, bool]":
    """The same for a pipeline."""
    from launch.on_ray.job_plan import plan_pipeline_job
    from llmtrain.cli.pipelines import checked_pipeline
    from llmtrain.config.reading.pipeline import load_pipeline

    overrides = [*overrides, "run.backend=ray"]
    config = load_pipeline(path, overrides).config if looks_only else checked_pipeline(path, overrides)
    return plan_pipeline_job(config, Path.cwd()), config.run.allow_open_cluster


def _on_server(plan: "JobPlan", allow_open: bool, address: str | None, action: str) -> None:
    """Submit a job, or look at the newest one of the same run."""
    if action == "--dry-run":
        _print_plan(plan)
        return
    from launch.on_ray.jobs import DEFAULT_SERVER, JobServer

    address = address or os.environ.get("RAY_API_SERVER_ADDRESS") or DEFAULT_SERVER
    server = JobServer(address, os.environ, allow_open)
    if action in LOOKS:
        _look(server, plan, action)
    else:
        _submit(server, plan, action == "--follow")


def _submit(server: "JobServer", plan: "JobPlan", follow: bool) -> None:
    from launch.on_ray.jobs import exit_code_of

    job_id = server.submit(plan)
    typer.echo(job_id)
    if not follow:
        return
    try:
        ended = server.follow(job_id)
    except KeyboardInterrupt:
        typer.echo(f"\n{job_id} goes on. --logs shows what it prints, --stop lets it save and stop.", err=True)
        raise
    raise typer.Exit(exit_code_of(ended, plan))


def _look(server: "JobServer", plan: "JobPlan", action: str) -> None:
    from llmtrain.errors import LaunchError

    job = server.newest(plan.run_folder)
    if job is None:
        raise LaunchError(f"{plan.run_folder}: Ray at {server.address} knows no job of this run.")
    if action == "--logs":
        typer.echo(server.log(job.job_id), nl=False)
        return
    job = server.stop(job.job_id) if action == "--stop" else job
    typer.echo(f"{job.job_id} {job.status}" + ("" if job.exit_code is None else f" exit code {job.exit_code}"))


def _checked(path: Path, overrides: list[str]) -> "RunConfig":
    """The configuration as it was asked for, once everything is right. Warns of what may stop the run on its way."""
    from llmtrain.config.rules.arithmetic import schedule_warnings
    from llmtrain.preflight.storage import load_run, storage_warnings

    resolved = load_run(path, overrides)
    for warning in schedule_warnings(resolved.config) + storage_warnings(resolved.config):
        typer.echo(f"warning: {warning}", err=True)
    return resolved.asked


def _print_plan(plan: "JobPlan") -> None:
    """Two YAML documents: what Ray is asked for, and the configuration that is uploaded."""
    import json

    asked = {
        "submission_id": plan.submission_id,
        "entrypoint": plan.entrypoint,
        "runtime_env": {"working_dir": f"(a folder with {plan.config_name})", "env_vars": plan.env_vars},
        "metadata": plan.metadata,
    }
    typer.echo(f"{json.dumps(asked, indent=2)}\n---\n# {plan.config_name}\n{plan.shown_text}", nl=False)
