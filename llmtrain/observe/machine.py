"""The machine and the software of a run: described once at its start, and its load sampled while the run goes on.

Names and versions only. Values of environment variables, user names and host names are never recorded.
"""

import json
import os
import platform
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch

from llmtrain.files import replace_file, sealed

ENVIRONMENT_FILE = "environment.json"
PACKAGES = (
    "llmtrain",
    "torch",
    "numpy",
    "safetensors",
    "sentencepiece",
    "tokenizers",
    "transformers",
    "webdataset",
    "wandb",
)


def describe_environment() -> dict[str, Any]:
    """Versions, platform, processor, devices, and the commit of llmtrain's source where it lies in a git repository."""
    versions = {}
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {
        "python": platform.python_version(),
        "packages": versions,
        "commit": source_commit(Path(__file__)),
        "platform": platform.platform(),
        "cpu": {
            "model": _cpu_model(),
            "cores": psutil.cpu_count(logical=False),
            "usable": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "memory_bytes": psutil.virtual_memory().total,
        },
        "devices": [
            {"name": device.name, "memory_bytes": device.total_memory}
            for device in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
        ],
        "cuda": torch.version.cuda,
    }


def save_environment(run_dir: Path) -> None:
    """Write the description into a run folder, where `llmtrain report` finds it."""
    replace_file(run_dir / ENVIRONMENT_FILE, (json.dumps(sealed(describe_environment()), indent=2) + "\n").encode())


def source_commit(file: Path) -> str | None:
    """Commit of the repository that tracks `file`, with `+changes` where tracked files differ; None where none does."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(file.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        # An installed package may lie below a repository that has nothing to do with it.
        git("ls-files", "--error-unmatch", file.name)
        changes = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+changes" if changes else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _cpu_model() -> str:
    """The processor's name where Linux tells it, else what the platform says."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


SAMPLE_SECONDS = 1.0
"""Rows that follow the last sample sooner carry none: asking the system takes as long as a very small step."""


class SystemMeter:
    """Samples the machine when asked: it has no thread. Rates are means since the sample before.

    Columns are those of docs/concepts.md. What a machine does not tell, such as the counters of its disks inside of
    some containers, has no column.
    """

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._process = psutil.Process()
        self._gpu = device if device.type == "cuda" else None
        psutil.cpu_percent()  # the first answer means nothing
        self._process.cpu_percent()
        self._traffic = _traffic()
        self._sampled_at = clock()

    def sample(self) -> dict[str, float]:
        """The columns of one row; none where the last sample is younger than SAMPLE_SECONDS."""
        now = self._clock()
        seconds = now - self._sampled_at
        if seconds < SAMPLE_SECONDS:
            return {}
        self._sampled_at = now
        memory = psutil.virtual_memory()
        columns = {
            "resident_bytes": self._process.memory_info().rss,
            "system_cpu_percent": psutil.cpu_percent(),
            "system_process_cpu_percent": self._process.cpu_percent(),
            "system_memory_percent": memory.percent,
            "system_memory_used_bytes": memory.total - memory.available,
        }
        before, self._traffic = self._traffic, _traffic()
        for name, count in self._traffic.items():
            if name in before:
                columns[f"system_{name}_per_second"] = max(0.0, count - before[name]) / seconds
        if self._gpu is not None:
            columns |= _gpu_columns(self._gpu)
        return columns


_COUNTERS: tuple[tuple[Callable[[], object], dict[str, str]], ...] = (
    (psutil.net_io_counters, {"network_sent_bytes": "bytes_sent", "network_received_bytes": "bytes_recv"}),
    (psutil.disk_io_counters, {"disk_read_bytes": "read_bytes", "disk_written_bytes": "write_bytes"}),
)
"""Counters of bytes since the machine was started, and the names of their columns."""

_GPU_QUESTIONS: tuple[tuple[str, Callable[[torch.device], float]], ...] = (
    ("system_gpu_utilization_percent", torch.cuda.utilization),
    ("system_gpu_temperature_celsius", torch.cuda.temperature),
    ("system_gpu_power_watts", lambda device: torch.cuda.power_draw(device) / 1000),
)


def _traffic() -> dict[str, float]:
    """Bytes since the machine was started, where it counts them."""
    found = {}
    for ask, names in _COUNTERS:
        try:
            counters = ask()
        except (OSError, RuntimeError, psutil.Error):
            continue
        if counters is not None:
            found |= {name: float(getattr(counters, attribute)) for name, attribute in names.items()}
    return found


def _gpu_columns(device: torch.device) -> dict[str, float]:
    """The columns of this rank's GPU. Some need NVIDIA's management library for Python and the right to ask it."""
    columns = {
        "device_allocated_bytes": float(torch.cuda.memory_allocated(device)),
        "device_reserved_bytes": float(torch.cuda.memory_reserved(device)),
    }
    for name, ask in _GPU_QUESTIONS:
        try:
            columns[name] = float(ask(device))
        except Exception:  # its errors are the driver's own classes, or the library is missing
            continue
    return columns
