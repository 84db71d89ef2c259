"""What a job on a Ray cluster is to do: its command, its environment, and the configuration that is uploaded.

The file system is shared, as with Slurm: paths mean the same on the cluster.
"""

import os
import secrets
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from launch.forking.environment import passed_environment
from llmtrain.config.pipelines.schema import PipelineConfig
from llmtrain.config.reading.rendering import plain_yaml, record_of, to_yaml, without_secrets
from llmtrain.config.schema import RunConfig
from llmtrain.data.storage.remote import scheme_of

RUN_FOLDER = "llmtrain_run_folder"
"""The metadata by which a run's jobs are found again."""

JOB_FOLDER = "LLMTRAIN_JOB_FOLDER"
"""The variable that names the folder in which a pipeline was submitted."""

END_SECONDS = 30
"""Time for a command to end, beyond what it may take to save."""


@dataclass(frozen=True)
class JobPlan:
    """The job that Ray is to run. `config_text` is uploaded as `config_name`; `shown_text` is that without secrets.

    `keeps_all`: what was done is kept, however the job is stopped.
    """

    submission_id: str
    entrypoint: str
    env_vars: dict[str, str]
    run_folder: Path
    config_name: str
    config_text: str = field(repr=False)
    shown_text: str
    keeps_all: bool = False

    @property
    def metadata(self) -> dict[str, str]:
        return {RUN_FOLDER: str(self.run_folder)}


def plan_job(config: RunConfig, folder: Path, environ: Mapping[str, str]) -> JobPlan:
    """The job for a configuration whose relative paths are taken from `folder`."""
    # ray_address: that of the job's cluster, which Ray tells it.
    frozen = with_absolute_paths(config.with_keys({"launch.ray_address": None}), folder)
    launch = frozen.launch
    patience = launch.watchdog.step_seconds + launch.watchdog.checkpoint_seconds
    name = "run.yaml"
    return JobPlan(
        _submission_id(config.name),
        f"{_path()}; exec llmtrain train {name}",
        {**passed_environment(environ, launch.pass_environment), **_stop_wait(launch.grace_seconds or patience)},
        frozen.run_dir,
        name,
        to_yaml(frozen),
        record_of(frozen),
    )


def plan_pipeline_job(config: PipelineConfig, folder: Path) -> JobPlan:
    """The job for a pipeline that is submitted in `folder`, and works there.

    Its paths stay as they are: names of documents hold them, so with absolute ones it would be another pipeline.
    """
    # address: that of the job's cluster, which Ray tells it.
    config = config.with_keys({"run.backend": "ray", "run.address": None})
    # What nobody wrote is left out: a rule may refuse a key that is written and has no effect.
    values = config.model_dump(mode="json", exclude_unset=True)
    text = plain_yaml(values)
    name = "pipeline.yaml"
    return JobPlan(
        _submission_id(config.name),
        f'{_path()}; config="$PWD"/{name}; cd -- "${JOB_FOLDER}" || exit 2; exec llmtrain data run "$config"',
        {JOB_FOLDER: str(folder), **_stop_wait(config.run.grace_seconds or 24 * 3600)},
        folder / config.output_dir / config.name,
        name,
        text,
        without_secrets(text, values),
        keeps_all=True,
    )


def _path() -> str:
    """Begins the line that Ray gives to a shell. The command is the one that the cluster's PATH has, or else this one.

    Nothing in the line is from a configuration. Its `exec` lets signals reach the command.
    """
    return f'export PATH="$PATH":{shlex.quote(str(Path(sys.executable).parent))}'


def _submission_id(name: str) -> str:
    return f"{name}-{datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"


def _stop_wait(seconds: float) -> dict[str, str]:
    """Ray kills what it has told to stop after so long: by default after 3 seconds, which is too short to save."""
    return {"RAY_JOB_STOP_WAIT_TIME_S": str(round(seconds + END_SECONDS))}


NO_PATHS = ("auto", "none")
"""Values of checkpoint.resume that are words."""


def with_absolute_paths(config: RunConfig, folder: Path) -> RunConfig:
    """The configuration with its relative paths taken from `folder`, an absolute one. URLs stay."""

    def absolute(path: str) -> str:
        # As the system would take it; but of two slashes at the beginning nothing is made of one.
        return path if scheme_of(path) else os.path.join(folder, path)  # noqa: PTH118  # Path would change the text

    def absolute_or_none(path: str | None) -> str | None:
        return None if path is None else absolute(path)

    data, resume = config.data, config.checkpoint.resume
    sources = {
        f"data.{key}": tuple(source.with_keys({"path": absolute(source.path)}) for source in getattr(data, key))
        for key in ("train", "valid")
    }
    return config.with_keys(
        {
            **sources,
            "output_dir": absolute(config.output_dir),
            "data.tokenizer": absolute_or_none(data.tokenizer),
            "data.cache_dir": absolute_or_none(data.cache_dir),
            "engine.nvme_path": absolute_or_none(config.engine.nvme_path),
            "checkpoint.resume": resume if resume in NO_PATHS else absolute(resume),
        }
    )
