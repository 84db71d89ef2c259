"""What a run, a checkpoint and a report record about the machine and the software.

Names and versions only. Values of environment variables, user names and host names are never recorded.
"""

import json
import os
import platform
import subprocess
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
    return {
        "python": platform.python_version(),
        "packages": _versions(),
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


def _versions() -> dict[str, str]:
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _cpu_model() -> str:
    """The processor's name where Linux tells it, else what the platform says."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
