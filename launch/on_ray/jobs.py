"""Runs and pipelines as jobs of a Ray cluster: their submission, and how a job is followed and stopped."""

import asyncio
import logging
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.forking.environment import changed_environment
from launch.on_ray.access import job_server_token
from launch.on_ray.job_plan import RUN_FOLDER, JobPlan
from llmtrain.errors import EXIT_PREEMPTED, EXIT_TOLD_TWICE, LaunchError, RunFolderInUseError
from llmtrain.runs.status import read_status

DEFAULT_SERVER = "http://127.0.0.1:8265"

EXIT_NOT_FOUND = 127
POLL_SECONDS = 0.5
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")


@dataclass(frozen=True)
class Job:
    """One job of a run, as Ray knows it. `exit_code` is the command's, once it has ended by itself."""

    job_id: str
    status: str
    exit_code: int | None
    message: str


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
        """Submit a job and return its id. Raises RunFolderInUseError where one of the same run has not ended."""
        before = self.newest(plan.run_folder)
        if before is not None and before.status not in ENDED:
            raise RunFolderInUseError(
                f"{plan.run_folder}: job {before.job_id} of this run is {before.status}. Wait for it, or "
                "stop it first: `llmtrain submit CONFIG --to ray --stop`."
            )
        with tempfile.TemporaryDirectory(prefix="llmtrain-job-") as folder, self._errors():
            # Ray keeps the mode where it unpacks the file.
            (Path(folder) / plan.config_name).touch(0o600)
            (Path(folder) / plan.config_name).write_text(plan.config_text, "utf-8")
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


def exit_code_of(job: Job, plan: JobPlan) -> int:
    """The exit code that the command of a job ended with. Raises LaunchError where it was never started.

    Ray does not keep that of a job which it has told to stop: then the run folder says whether it has saved. Of a
    pipeline all that was done is kept, however it was stopped.
    """
    if job.status == "STOPPED":
        said = None if plan.keeps_all else read_status(plan.run_folder)
        unsaid = EXIT_PREEMPTED if plan.keeps_all else EXIT_TOLD_TWICE
        return {"preempted": EXIT_PREEMPTED, "done": 0}.get(said.status if said else "", unsaid)
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
