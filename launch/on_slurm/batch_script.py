"""Batch scripts for Slurm: a header from the configuration, the arguments fixed, and the body of a file in slurm/.

Nothing that a user wrote is ever code in the script. Values in the header are escaped as sbatch reads them, all others
are quoted for bash, each on one line.
"""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from launch.on_slurm.asked_job import AskedJob, asked_job
from llmtrain.config.pipelines.schema import PipelineConfig
from llmtrain.config.reading.credentials import text_without_credentials
from llmtrain.config.reading.document import COMMAND_LINE
from llmtrain.config.reading.rendering import shown
from llmtrain.config.schema import RunConfig
from llmtrain.errors import ConfigError, LaunchError, Problem
from llmtrain.runs.rank_logs import LOGS

PLAIN = re.compile(r"[A-Za-z0-9_.,:@+/=%-]+")
"""Characters that sbatch takes in a header as they are."""

UNPRINTED = re.compile("[\x00-\x1f\x7f\udc80-\udcff]")
"""Control characters, and bytes of names that are not UTF-8."""

LOG_NAME = "slurm-%j.log"
SCRIPT_NAME = "job.sbatch"


def render(
    config: RunConfig | PipelineConfig, config_path: Path, overrides: Sequence[str], folder: Path | None = None
) -> str:
    """The batch script that `sbatch` gets: it runs `llmtrain train config_path overrides...` in `folder`, or for a
    pipeline `llmtrain data run` in its place.

    `folder` is the working directory if absent. Raises ConfigError for a path that Slurm cannot take, for ranks or
    tasks that cannot be spread over the machines evenly, and for credentials among the overrides.
    """
    folder = folder or Path.cwd()
    job = asked_job(config)
    if problems := [*job.problems, *_secrets_in(overrides)]:
        raise ConfigError(problems)
    header = [f"#SBATCH {option}" for option in _options(job, folder)]
    setup = job.slurm.setup
    prologue = [
        f"cd -- {quoted(str(folder))} || exit 1",
        f'export PATH={quoted(str(Path(sys.executable).parent))}:"$PATH"',
        *([f". {quoted(str(folder / setup))} || exit 1"] if setup else []),
        f"set -- {' '.join(quoted(word) for word in (str(config_path), *overrides))}",
    ]
    return "\n".join(["#!/bin/bash", *header, "", *prologue, "", job.body])


def _secrets_in(overrides: Sequence[str]) -> Iterator[Problem]:
    """Slurm keeps a script where others can read it, and so are the arguments of a program."""
    for override in overrides:
        key, _, value = override.partition("=")
        if text_without_credentials(value) != value:
            message = (
                "its user, password or query would stand in the job's script and in the lists of processes. Write the "
                "URL into the run's file, which only you need to be able to read."
            )
            yield Problem(key, message, shown(key, value), COMMAND_LINE)


def submit(config: RunConfig | PipelineConfig, config_path: Path, overrides: Sequence[str]) -> str:
    """Submit a run or a pipeline to Slurm and return the job's id. The script is kept in its folder.

    Raises ConfigError for what cannot be written into it, LaunchError where sbatch is absent or refuses.
    """
    script = render(config, config_path, overrides)
    job = asked_job(config)
    setup = job.slurm.setup
    if setup and not Path(setup).is_file():
        raise ConfigError([Problem(f"{job.section}.setup", "there is no such file. Correct the path.", setup)])
    run_dir = Path.cwd() / job.folder
    try:
        (run_dir / LOGS).mkdir(parents=True, exist_ok=True)
        path = run_dir / SCRIPT_NAME
        path.unlink(missing_ok=True)
        path.touch(0o600)
        path.write_bytes(script.encode())
    except OSError as error:
        message = f"{error.filename or run_dir}: the job's script cannot be written: {error.strerror}. "
        raise LaunchError(message + "Set output_dir to a folder that can be written.") from error
    try:
        done = subprocess.run(["sbatch", "--parsable", str(path)], capture_output=True, text=True, check=False)
    except OSError as error:
        raise LaunchError(f"sbatch: cannot be started: {error.strerror}. Is Slurm's client on PATH here?") from error
    if done.returncode != 0:
        raise LaunchError(f"sbatch has refused the job:\n{done.stderr.strip()}")
    return done.stdout.strip().partition(";")[0]


def quoted(text: str) -> str:
    """A text as one word of bash, on one line: sbatch refuses some control characters, and bytes may be no UTF-8."""
    if not UNPRINTED.search(text):
        return shlex.quote(text)
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return "$'" + UNPRINTED.sub(lambda match: f"\\{os.fsencode(match[0])[0]:03o}", escaped) + "'"


def _options(job: AskedJob, folder: Path) -> Iterator[str]:
    """The options of the job, as they stand in the header."""
    slurm = job.slurm
    yield f"--job-name={job.name}"
    yield from job.size
    named = {name: getattr(slurm, name) for name in ("partition", "account", "qos", "reservation", "constraint")}
    for option, value in {**named, "time": slurm.time, "mem": slurm.memory}.items():
        if value is not None:
            yield f"--{option}={_header_value(value)}"
    if slurm.exclusive:
        yield "--exclusive"
    yield f"--signal=B:USR1@{slurm.warn_seconds}"
    yield "--requeue"
    yield "--open-mode=append"
    yield f"--output={_log_pattern(job, folder)}"


def _log_pattern(job: AskedJob, folder: Path) -> str:
    """Where the job's log goes: into the run folder's logs. Raises ConfigError where Slurm cannot be told that."""
    logs = str(folder / job.folder / LOGS)
    if "\\" in logs or UNPRINTED.search(logs):
        message = (
            "holds a backslash, a control character or what is no UTF-8, with the working directory before it. Slurm "
            "takes no such path for a job's log. Choose another folder."
        )
        raise ConfigError([Problem("output_dir", message, repr(job.output_dir))])
    return _header_value(f"{logs.replace('%', '%%')}/{LOG_NAME}")


def _header_value(text: str) -> str:
    """A value as sbatch reads it back: in double quotes, where a quote has a backslash."""
    return text if PLAIN.fullmatch(text) else '"' + text.replace('"', '\\"') + '"'
