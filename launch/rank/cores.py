"""How many threads a rank computes with, of the cores that are free for it. Pure: imports no torch."""

import math
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import psutil

from launch.rank.cgroup import ROOT, cpu_quota
from llmtrain.config.launch import LaunchConfig
from llmtrain.errors import ConfigError

VARIABLE = "OMP_NUM_THREADS"
RECORD = "LLMTRAIN_USER_OMP_NUM_THREADS"
"""What the user had in VARIABLE, empty where nothing. Whoever sets VARIABLE for ranks keeps that here."""

WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""What says how threads wait for each other; where the user has set one of them, that holds."""

SPINS = {"GOMP_SPINCOUNT": "1000"}
"""Threads that wait for one which has no core soon sleep. By themselves GNU's spin for milliseconds, on the very cores
that are wanted: beside other load a step took two and a half times as long (docs/performance.md)."""


def num_threads(launch: LaunchConfig, local_world_size: int, environ: Mapping[str, str] = os.environ) -> int:
    """CPU threads of one rank: as configured, else as the user's environment says, else its share of the free cores.

    Raises ConfigError.
    """
    return launch.threads_per_worker or user_threads(environ) or max(1, usable_cores() // local_world_size)


def usable_cores(root: Path = ROOT) -> int:
    """Cores that this process may keep busy: those it is bound to, and no more than its control groups' quota."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(bound, math.floor(cpu_quota(root) or bound)))


def user_threads(environ: Mapping[str, str]) -> int | None:
    """OMP_NUM_THREADS, where the user has set it. Raises ConfigError where it is no number of threads."""
    text = environ.get(RECORD)
    if text is None:
        text = "" if _set_by_starter(environ) else environ.get(VARIABLE, "")
    first = text.split(",")[0].strip()  # the numbers after it are for threads within threads
    if not first:
        return None
    if not first.isdecimal() or int(first) < 1:
        raise ConfigError(
            f"{VARIABLE} = {text}, in the environment: must be a whole number, at least 1. Unset it, or set "
            "launch.threads_per_worker."
        )
    return int(first)


def _set_by_starter(environ: Mapping[str, str]) -> bool:
    """Whether torchrun or Ray has written its own 1 into OMP_NUM_THREADS, where the user had nothing."""
    if environ.get(VARIABLE) != "1":
        return False
    if "TORCHELASTIC_RUN_ID" in environ:
        # torchrun writes it after its own start, so it does not stand among what torchrun was started with.
        with suppress(psutil.Error):
            return VARIABLE not in psutil.Process(os.getppid()).environ()
        return True
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in environ  # of a job's command, whose environment is an actor's


def record_of_user(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables by which a process that is started elsewhere knows what the user has set here."""
    return {RECORD: str(user_threads(environ) or ""), **_waiting(environ)}


def set_threads(threads: int) -> None:
    """Tell the libraries that read it when they are loaded how many threads to use. Call before importing torch."""
    os.environ.update(record_of_user(os.environ))
    os.environ[VARIABLE] = str(threads)


def _waiting(environ: Mapping[str, str]) -> dict[str, str]:
    return {name: environ[name] for name in WAITING if name in environ} or SPINS
