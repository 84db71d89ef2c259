"""The machine and the services around it: processors, memory, limits, clock, disk; Ray, Slurm and Weights & Biases.

Tells of secrets only whether they are there.
"""

import math
import netrc
import os
import resource
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.parse import urlsplit

import psutil

from launch.rank.cores import cpu_quota, memory_limit
from llmtrain.checks.doctor.findings import Finding
from llmtrain.runs.file_system import existing_folder, folder_fault

SHARED_MEMORY = Path("/dev/shm")
LEAST_SHARED_BYTES = 1 << 30
LEAST_FREE_BYTES = 1 << 30
LEAST_OPEN_FILES = 4096
LEAST_PROCESSES = 4096
MOST_LOAD = 2.0
"""Processes per core that want to compute, above which everything is slow."""

MOST_CLOCK_SECONDS = 5.0
WANDB_SERVER = "https://api.wandb.ai"
COMMAND_SECONDS = 5.0


def machine_findings(output_dir: Path) -> Iterator[Finding]:
    """All of it; `output_dir` is where runs would be written."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    yield cpu_finding(usable, os.cpu_count() or usable, cpu_quota(), os.getloadavg()[0])
    yield memory_finding(psutil.virtual_memory().total, psutil.virtual_memory().available, memory_limit())
    if SHARED_MEMORY.is_dir():
        yield shared_memory_finding(shutil.disk_usage(SHARED_MEMORY).total)
    yield limit_finding("open files", resource.getrlimit(resource.RLIMIT_NOFILE)[0], LEAST_OPEN_FILES, "-n")
    yield limit_finding("processes", resource.getrlimit(resource.RLIMIT_NPROC)[0], LEAST_PROCESSES, "-u")
    yield locked_memory_finding(resource.getrlimit(resource.RLIMIT_MEMLOCK)[0])
    synchronized = output_of("timedatectl", "show", "--property=NTPSynchronized", "--value")  # systemd's word
    yield clock_finding({"yes": True, "no": False}.get(synchronized or ""))
    yield disk_finding(output_dir)


def cpu_finding(usable: int, present: int, quota: float | None, load: float = 0.0) -> Finding:
    """How many cores a process may use, of those that are there. `quota` is a container's, in cores; `load` is how many
    processes want to compute."""
    text = f"{usable} of {present} cores usable"
    if quota is not None and quota < usable:
        ranks = f"ranks take {max(1, math.floor(quota))} in all"
        mend = "give the job more time of its cores (--cpus of a container, CPUQuota of systemd)"
        return Finding("machine", "CPU", "limited", f"{text}, a quota of {quota:g} cores (cgroup): {ranks}", mend)
    if usable < present:
        mend = "give the job more cores (taskset, --cpus-per-task of Slurm, --cpuset-cpus of a container)"
        return Finding("machine", "CPU", "limited", text, mend)
    if load > MOST_LOAD * usable:
        mend = "ps aux --sort=-%cpu | head   (shows who else computes here)"
        return Finding("machine", "CPU", "limited", f"{text}, and {load:.0f} processes want them", mend)
    return Finding("machine", "CPU", "ok", text)


def memory_finding(total: int, available: int, limit: int | None) -> Finding:
    """Sizes in bytes; `limit` is a container's."""
    text = f"{gib(total)}, {gib(available)} of it free"
    if limit is not None and limit < total:
        return Finding("machine", "memory", "limited", f"{text}; this process may have {gib(limit)} (cgroup)")
    return Finding("machine", "memory", "ok", text)


def shared_memory_finding(total: int) -> Finding:
    """NCCL and Ray keep their buffers in /dev/shm; containers give it 64 MiB."""
    text = f"{SHARED_MEMORY} has {gib(total)}"
    if total >= LEAST_SHARED_BYTES:
        return Finding("machine", "shared memory", "ok", text)
    mend = f"mount -o remount,size=8G {SHARED_MEMORY}   (a container: docker run --shm-size=8g)"
    return Finding("machine", "shared memory", "limited", f"{text}: little for NCCL and Ray", mend)


def limit_finding(name: str, limit: int, least: int, option: str) -> Finding:
    """A limit of this process, by its option of `ulimit`."""
    unlimited = limit == resource.RLIM_INFINITY
    text = f"{'no limit' if unlimited else f'{limit:,}'} (ulimit {option})"
    if unlimited or limit >= least:
        return Finding("machine", name, "ok", text)
    return Finding("machine", name, "limited", f"{text}: few for many ranks", f"ulimit {option} {16 * least}")


def locked_memory_finding(limit: int) -> Finding:
    """InfiniBand pins the memory that it sends from. The limit is in bytes."""
    if limit == resource.RLIM_INFINITY:
        return Finding("machine", "locked memory", "ok", "no limit (ulimit -l)")
    text = f"{limit // 1024:,} KiB (ulimit -l)"
    if not Path("/sys/class/infiniband").is_dir():
        return Finding("machine", "locked memory", "ok", f"{text}; there is no InfiniBand that needs more")
    return Finding("machine", "locked memory", "limited", f"{text}: InfiniBand needs more", "ulimit -l unlimited")


def clock_finding(synchronized: bool | None) -> Finding:
    """The finding about the clock: a time server sets it, or nobody does."""
    now = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    if synchronized is False:
        return Finding("machine", "clock", "limited", f"{now}, set by nobody", "timedatectl set-ntp true")
    return Finding("machine", "clock", "ok", now if synchronized is None else f"{now}, synchronized")


def disk_finding(output_dir: Path) -> Finding:
    """The finding about the disk of a run: it can be written and locked, has room, and has this machine's clock."""
    name, mend = "output folder", "write runs elsewhere: output_dir=FOLDER"
    fault = folder_fault(output_dir)
    if fault is not None:
        return Finding("machine", name, "broken", fault, mend, needed=True)
    place = existing_folder(output_dir)
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            # Only what is on the disk shows a full one, and the clock of a file server.
            file.write(b"x" * 4096)
            file.flush()
            os.fsync(file.fileno())
            ahead = os.fstat(file.fileno()).st_mtime - time.time()
    except OSError as error:
        return Finding("machine", name, "broken", f"{place} cannot be written: {error.strerror}", mend, needed=True)
    free = shutil.disk_usage(place).free
    text = f"{output_dir}: {gib(free)} free"
    if free < LEAST_FREE_BYTES:
        mend = "free some space, or write runs elsewhere: output_dir=FOLDER"
        return Finding("machine", name, "limited", f"{text}: little for checkpoints", mend)
    if abs(ahead) > MOST_CLOCK_SECONDS:
        text += f"; its clock differs from this machine's by {ahead:+.0f} s"
        return Finding("machine", name, "limited", text, "timedatectl set-ntp true   (here, and on the file server)")
    return Finding("machine", name, "ok", text)


def output_of(*command: str) -> str | None:
    """The output of a command; None where it is not here, fails, or does not answer."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def gib(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:,.1f} GiB"


def service_findings(environment: Mapping[str, str], broken: Mapping[str, str]) -> Iterator[Finding]:
    """`broken` are the packages that cannot be imported, with the error: what depends on them is not told of again."""
    yield Finding("launchers", "local", "ok", "launch.backend=local: ranks are processes of this machine")
    if "ray" not in broken:
        yield ray_finding(environment)
    yield slurm_finding(environment)
    if "wandb" not in broken:
        yield wandb_finding(environment)


def ray_finding(environment: Mapping[str, str]) -> Finding:
    """The finding about Ray: the cluster that a run would use, and the place of its token."""
    address = environment.get("RAY_ADDRESS")
    where = f"the cluster at RAY_ADDRESS = {address}" if address else "a Ray of the run's own, or launch.ray_address"
    if environment.get("RAY_AUTH_TOKEN"):
        token = "the token of RAY_AUTH_TOKEN"
    else:
        file = Path(environment.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
        token = f"the token in {file}" if file.is_file() else "no token of a cluster is here"
        if file.is_file() and file.stat().st_mode & 0o077:
            text = f"launch.backend=ray: {where}, with {token}, which others can read"
            return Finding("launchers", "ray", "limited", text, f"chmod 600 {file}")
    return Finding("launchers", "ray", "ok", f"launch.backend=ray: {where}; {token}")


def slurm_finding(environment: Mapping[str, str]) -> Finding:
    """The finding about Slurm: jobs can be submitted from here, or this is one."""
    missing = [name for name in ("sbatch", "srun") if shutil.which(name) is None]
    if missing:
        text = f"{' and '.join(missing)} not on the PATH: no jobs from here"
        mend = "apt-get install slurm-client   (on a cluster: go to its login node, or load its module)"
        return Finding("launchers", "slurm", "missing", text, mend)
    version = output_of("sbatch", "--version")
    if version is None:
        text = "sbatch is here, but finds neither its configuration nor a controller"
        mend = "sbatch --version   (says what it misses: /etc/slurm/slurm.conf, or SLURM_CONF)"
        return Finding("launchers", "slurm", "limited", text, mend)
    job = environment.get("SLURM_JOB_ID")
    if job:
        nodes = environment.get("SLURM_JOB_NUM_NODES", "?")
        return Finding("launchers", "slurm", "ok", f"{version}; inside of job {job}, of {nodes} nodes")
    partitions = output_of("sinfo", "--noheader", "--format=%P")
    if partitions is None:
        text = f"{version}, but its controller does not answer"
        return Finding("launchers", "slurm", "limited", text, "scontrol ping   (says which controller is down)")
    return Finding("launchers", "slurm", "ok", f"{version}; partitions: {', '.join(partitions.split()) or 'none'}")


def wandb_finding(environment: Mapping[str, str]) -> Finding:
    """The finding about Weights & Biases: runs can be sent there. The server is not asked."""
    server = environment.get("WANDB_BASE_URL") or WANDB_SERVER
    key = (
        "WANDB_API_KEY"
        if environment.get("WANDB_API_KEY")
        else _netrc_with(urlsplit(server).hostname or "", environment)
    )
    mode = environment.get("WANDB_MODE")
    asked = f"; WANDB_MODE = {mode}" if mode else ""
    if key:
        return Finding("records", "wandb", "ok", f"logged in to {server} by {key}{asked}")
    text = f"not logged in: observe.wandb offline and off work, online does not{asked}"
    return Finding("records", "wandb", "limited", text, "wandb login")


def _netrc_with(host: str, environment: Mapping[str, str]) -> str | None:
    """The file that holds a password for a host; None where there is none."""
    named = environment.get("NETRC")
    for file in [Path(named)] if named else [Path.home() / ".netrc", Path.home() / "_netrc"]:
        try:
            if netrc.netrc(os.fspath(file)).authenticators(host):
                return str(file)
        except (OSError, netrc.NetrcParseError):
            continue
    return None
