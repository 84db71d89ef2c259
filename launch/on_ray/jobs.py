"""Runs as jobs of a Ray cluster: their submission, and how a job is followed and stopped.

The file system is shared, as with Slurm: paths mean the same on the cluster. What is uploaded is the configuration.
"""

import asyncio
import logging
import os
import secrets
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from launch.forking.environment import changed_environment, passed_environment
from launch.on_ray.access import job_server_token
from llmtrain.config.reading.rendering import record_of, to_yaml
from llmtrain.config.schema import RunConfig
from llmtrain.data.storage.remote import scheme_of
from llmtrain.errors import EXIT_PREEMPTED, EXIT_TOLD_TWICE, LaunchError, RunFolderInUseError
from llmtrain.runs.status import read_status

DEFAULT_SERVER = "http://127.0.0.1:8265"
CONFIG_NAME = "run.yaml"
RUN_FOLDER = "llmtrain_run_folder"
"""The metadata by which a run's jobs are found again."""

EXIT_NOT_FOUND = 127
POLL_SECONDS = 0.5
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")


@dataclass(frozen=True)
class JobPlan:
    """The job that Ray is to run. `config_text` is uploaded as `run.yaml`; `shown_text` is that without secrets."""

    submission_id: str
    entrypoint: str
    env_vars: dict[str, str]
    run_folder: Path
    config_text: str = field(repr=False)
    shown_text: str

    @property
    def metadata(self) -> dict[str, str]:
        return {RUN_FOLDER: str(self.run_folder)}


@dataclass(frozen=True)
class Job:
    """One job of a run, as Ray knows it. `exit_code` is the command's, once it has ended by itself."""

    job_id: str
    status: str
    exit_code: int | None
    message: str


def plan_job(config: RunConfig, folder: Path, environ: Mapping[str, str]) -> JobPlan:
    """The job for a configuration whose relative paths are taken from `folder`."""
    # ray_address: that of the job's cluster, which Ray tells it.
    frozen = with_absolute_paths(config.with_keys({"launch.ray_address": None}), folder)
    launch = frozen.launch
    # Ray kills what it has told to stop after so long: by default after 3 seconds, which is too short to save.
    patience = launch.watchdog.step_seconds + launch.watchdog.checkpoint_seconds
    stop_seconds = round((launch.grace_seconds or patience) + 30)
    return JobPlan(
        submission_id=f"{config.name}-{datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}",
        entrypoint=entrypoint(),
        env_vars={
            **passed_environment(environ, launch.pass_environment),
            "RAY_JOB_STOP_WAIT_TIME_S": str(stop_seconds),
        },
        run_folder=frozen.run_dir,
        config_text=to_yaml(frozen),
        shown_text=record_of(frozen),
    )


def entrypoint() -> str:
    """The command that Ray gives to a shell. Nothing in it is from the configuration.

    The command is the one that the cluster's PATH has, or else this one. `exec` lets signals reach it.
    """
    folder = shlex.quote(str(Path(sys.executable).parent))
    return f'export PATH="$PATH":{folder}; exec llmtrain train {CONFIG_NAME}'


class JobServer:
    """The part of a cluster that takes jobs, at an address such as DEFAULT_SERVER.

    Raises LaunchError where nobody answers there, where its token is missing or wrong, and where it asks for none,
    is on other machines, and that is not allowed.
    """

    def __init__(self, address: str, environ: Mapping[str, str], allow_open: bool) -> None:
        token = job_server_token(address, environ, allow_open)
        from ray.job_submission import JobSubmissionClient

        self.address = address
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        # Ray would prefer these variables to the address.
        with self._errors(), changed_environment({}, without=("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")):
            self._client = JobSubmissionClient(address, headers=headers)
        # What is uploaded is small, and not worth a line; nor is that a log ends with its job.
        for name in ("ray", JobSubmissionClient.__module__):
            logging.getLogger(name).setLevel(logging.WARNING)

    def submit(self, plan: JobPlan) -> str:
        """Submit a run and return the job's id. Raises RunFolderInUseError where a job of the run has not ended."""
        before = self.newest(plan.run_folder)
        if before is not None and before.status not in ENDED:
            raise RunFolderInUseError(
                f"{plan.run_folder}: job {before.job_id} of this run is {before.status}. Wait for it, or "
                "stop it first: `llmtrain submit CONFIG --to ray --stop`."
            )
        with tempfile.TemporaryDirectory(prefix="llmtrain-job-") as folder, self._errors():
            # Ray keeps the mode where it unpacks the file.
            (Path(folder) / CONFIG_NAME).touch(0o600)
            (Path(folder) / CONFIG_NAME).write_text(plan.config_text, "utf-8")
            return self._client.submit_job(
                entrypoint=plan.entrypoint,
                runtime_env={"working_dir": folder, "env_vars": plan.env_vars},
                submission_id=plan.submission_id,
                metadata=plan.metadata,
            )

    def newest(self, folder: Path) -> Job | None:
        """The newest job of the run that has this folder; None where there is none."""
        with self._errors():
            jobs = [job for job in self._client.list_jobs() if (job.metadata or {}).get(RUN_FOLDER) == str(folder)]
        newest = max(jobs, key=lambda job: job.start_time or 0, default=None)
        return None if newest is None else _job(newest)

    def job(self, job_id: str) -> Job:
        with self._errors():
            return _job(self._client.get_job_info(job_id))

    def log(self, job_id: str) -> str:
        """All that a job has written up to now."""
        with self._errors():
            return self._client.get_job_logs(job_id)

    def stop(self, job_id: str) -> Job:
        """Tell a job to save and stop, and wait for its end."""
        with self._errors():
            self._client.stop_job(job_id)
        return self._wait(job_id)

    def follow(self, job_id: str) -> Job:
        """Write a job's log to stderr until it ends."""
        with self._errors():
            asyncio.run(self._tail(job_id))
        return self._wait(job_id)

    async def _tail(self, job_id: str) -> None:
        shown = 0
        while True:
            seen = 0
            # Each time from the beginning of the log: the server ends a connection that is quiet for long.
            async for lines in self._client.tail_job_logs(job_id):
                sys.stderr.write(lines[max(0, shown - seen) :])
                sys.stderr.flush()
                seen += len(lines)
                shown = max(shown, seen)
            if self.job(job_id).status in ENDED:
                return
            await asyncio.sleep(POLL_SECONDS)

    def _wait(self, job_id: str) -> Job:
        while (job := self.job(job_id)).status not in ENDED:
            time.sleep(POLL_SECONDS)
        return job

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Turn the errors of Ray's client and its HTTP libraries into LaunchError."""
        import aiohttp
        import requests
        from ray.exceptions import AuthenticationError

        kinds = (RuntimeError, ConnectionError, AuthenticationError, requests.RequestException, aiohttp.ClientError)
        try:
            yield
        except kinds as error:
            raise LaunchError(f"Ray jobs at {self.address}: {error}") from error


def exit_code_of(job: Job, folder: Path) -> int:
    """The exit code that the command of a job ended with. Raises LaunchError where it was never started.

    Ray does not keep that of a job which it has told to stop: then the run folder says whether it has saved.
    """
    if job.status == "STOPPED":
        said = read_status(folder)
        return {"preempted": EXIT_PREEMPTED, "done": 0}.get(said.status if said else "", EXIT_TOLD_TWICE)
    if job.exit_code == EXIT_NOT_FOUND:
        raise LaunchError(
            f"job {job.job_id}: the cluster does not find the command llmtrain. Install it on all its machines, "
            "and start Ray there with the command's folder in PATH (activate the venv before `ray start`)."
        )
    if job.exit_code is None and job.status == "FAILED":
        raise LaunchError(f"job {job.job_id} could not be started: {job.message}")
    return job.exit_code or 0


def _job(details: Any) -> Job:
    job_id = details.submission_id or details.job_id or ""
    return Job(job_id, str(details.status.value), details.driver_exit_code, details.message or "")


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
