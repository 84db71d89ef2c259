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
from importlib.resources import files
from pathlib import Path

from launch.on_slurm.launcher import cpus_per_rank
from llmtrain.config.reading.credentials import text_without_credentials
from llmtrain.config.reading.document import COMMAND_LINE
from llmtrain.config.reading.rendering import shown
from llmtrain.config.rules.launch import uneven_nodes
from llmtrain.config.schema import RunConfig
from llmtrain.errors import ConfigError, LaunchError, Problem
from llmtrain.runs.rank_logs import LOGS

BODY_MARK = "# ---- what the job does ----\n"
"""The line at which the body of a file in slurm/ begins. Above it are lines to edit by hand."""

BODIES = {"slurm": "train.sbatch", "ray": "train_on_ray.sbatch"}

PLAIN = re.compile(r"[A-Za-z0-9_.,:@+/=%-]+")
"""Characters that sbatch takes in a header as they are."""

UNPRINTED = re.compile("[\x00-\x1f\x7f\udc80-\udcff]")
"""Control characters, and bytes of names that are not UTF-8."""

LOG_NAME = "slurm-%j.log"
SCRIPT_NAME = "job.sbatch"


def render(config: RunConfig, config_path: Path, overrides: Sequence[str], folder: Path | None = None) -> str:
    """The batch script that `sbatch` gets: it runs `llmtrain train config_path overrides...` in `folder`.

    `folder` is the working directory if absent. Raises ConfigError for a path that Slurm cannot take, for ranks that
    cannot be spread over the machines evenly, and for credentials among the overrides.
    """
    folder = folder or Path.cwd()
    if problems := [*uneven_nodes(config), *_secrets_in(overrides)]:
        raise ConfigError(problems)
    header = [f"#SBATCH {option}" for option in _options(config, folder)]
    setup = config.launch.slurm.setup
    prologue = [
        f"cd -- {quoted(str(folder))} || exit 1",
        f'export PATH={quoted(str(Path(sys.executable).parent))}:"$PATH"',
        *([f". {quoted(str(folder / setup))} || exit 1"] if setup else []),
        f"set -- {' '.join(quoted(word) for word in (str(config_path), *overrides))}",
    ]
    return "\n".join(["#!/bin/bash", *header, "", *prologue, "", body(config)])


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


def body(config: RunConfig) -> str:
    """The body of the script, from slurm/: on Ray where the configuration asks for it, by srun otherwise."""
    name = BODIES["ray" if config.launch.backend == "ray" else "slurm"]
    return files("slurm").joinpath(name).read_text("utf-8").partition(BODY_MARK)[2]


def submit(config: RunConfig, config_path: Path, overrides: Sequence[str]) -> str:
    """Submit the run to Slurm and return the job's id. The script is kept in the run folder.

    Raises ConfigError for what cannot be written into it, LaunchError where sbatch is absent or refuses.
    """
    script = render(config, config_path, overrides)
    setup = config.launch.slurm.setup
    if setup and not Path(setup).is_file():
        raise ConfigError([Problem("launch.slurm.setup", "there is no such file. Correct the path.", setup)])
    run_dir = Path.cwd() / config.run_dir
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


def _options(config: RunConfig, folder: Path) -> Iterator[str]:
    """The options of the job, as they stand in the header."""
    launch, slurm = config.launch, config.launch.slurm
    per_node = launch.num_workers // slurm.nodes
    yield f"--job-name={config.name}"
    yield f"--nodes={slurm.nodes}"
    yield f"--ntasks={launch.num_workers}"
    yield f"--ntasks-per-node={per_node}"
    yield f"--cpus-per-task={cpus_per_rank(config)}"
    if launch.device == "cuda":
        yield f"--gpus-per-node={per_node}"
    named = {name: getattr(slurm, name) for name in ("partition", "account", "qos", "reservation", "constraint")}
    for option, value in {**named, "time": slurm.time, "mem": slurm.memory}.items():
        if value is not None:
            yield f"--{option}={_header_value(value)}"
    if slurm.exclusive:
        yield "--exclusive"
    yield f"--signal=B:USR1@{slurm.warn_seconds}"
    yield "--requeue"
    yield "--open-mode=append"
    yield f"--output={_log_pattern(config, folder)}"


def _log_pattern(config: RunConfig, folder: Path) -> str:
    """Where the job's log goes: into the run folder's logs. Raises ConfigError where Slurm cannot be told that."""
    logs = str(folder / config.run_dir / LOGS)
    if "\\" in logs or UNPRINTED.search(logs):
        message = (
            "holds a backslash, a control character or what is no UTF-8, with the working directory before it. Slurm "
            "takes no such path for a job's log. Choose another folder."
        )
        raise ConfigError([Problem("output_dir", message, repr(config.output_dir))])
    return _header_value(f"{logs.replace('%', '%%')}/{LOG_NAME}")


def _header_value(text: str) -> str:
    """A value as sbatch reads it back: in double quotes, where a quote has a backslash."""
    return text if PLAIN.fullmatch(text) else '"' + text.replace('"', '\\"') + '"'
