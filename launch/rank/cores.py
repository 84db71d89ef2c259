"""The cores and memory that a process may use, and how many threads a rank computes with. Pure: imports no torch.

The kernel's control groups limit both: containers, systemd and batch systems set them. Version 2 has one tree of
groups, version 1 one per controller. The least of a process's group and the groups around it holds. Within a container
its own group may be seen as the root of the tree.
"""

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath

import psutil

from llmtrain.config.launch import LaunchConfig
from llmtrain.errors import ConfigError

ROOT = Path("/")
CONTROLLERS = "sys/fs/cgroup"
UNLIMITED_BYTES = 1 << 60
"""Version 1 says a number about as large as there are addresses where there is no limit."""


def cpu_quota(root: Path = ROOT) -> float | None:
    """Cores' worth of time that this process's groups get; None where nothing limits it."""
    quotas: list[float] = []
    for folder in _folders(root, "cpu"):
        quota, _, period = _text(folder / "cpu.max").partition(" ")
        if not quota:
            quota, period = _text(folder / "cpu.cfs_quota_us"), _text(folder / "cpu.cfs_period_us")
        if quota.isdigit() and period.isdigit() and int(period):
            quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def memory_limit(root: Path = ROOT) -> int | None:
    """Bytes that this process's groups may have in memory; None where nothing limits it."""
    limits = [
        int(text)
        for folder in _folders(root, "memory")
        for text in (_text(folder / "memory.max"), _text(folder / "memory.limit_in_bytes"))
        if text.isdigit() and int(text) < UNLIMITED_BYTES
    ]
    return min(limits, default=None)


def _folders(root: Path, controller: str) -> Iterator[Path]:
    """The folders of this process's group and of those around it, the roots too."""
    tops = root / CONTROLLERS
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers and controller not in controllers.split(","):
            continue
        inner = PurePosixPath(*(part for part in PurePosixPath(path).parts if part not in ("/", "..")))
        for top in (tops, tops / "unified") if not controllers else (tops / controllers, tops / controller):
            yield from (top / group for group in (inner, *inner.parents))


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8").strip()
    except OSError:
        return ""


VARIABLE = "OMP_NUM_THREADS"
RECORD = "LLMTRAIN_USER_OMP_NUM_THREADS"
"""Keeps the user's own value of VARIABLE, empty where there was none, when VARIABLE is set for ranks."""

WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""The variables that say how threads wait for each other. Where the user has set one of them, that holds."""

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
    """True where torchrun or Ray has written its own 1 into OMP_NUM_THREADS, and the user nothing."""
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
    waiting = {name: environ[name] for name in WAITING if name in environ} or SPINS
    return {RECORD: str(user_threads(environ) or ""), **waiting}


def set_threads(threads: int) -> None:
    """Tell the libraries that read it when they are loaded how many threads to use. Call before importing torch."""
    os.environ.update(record_of_user(os.environ))
    os.environ[VARIABLE] = str(threads)
