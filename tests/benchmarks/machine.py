"""On what the figures were measured."""

import os
import platform
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import psutil
import torch

PACKAGES = ("torch", "transformers", "webdataset", "safetensors", "sentencepiece", "numpy")


def describe_machine() -> dict[str, str]:
    """Processor, memory, versions and thread settings, each as one line for people."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "processor": f"{processor_name()}, {os.cpu_count()} cores, {psutil.virtual_memory().total / 2**30:.0f} GiB",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU only",
        "versions": ", ".join(
            [f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in PACKAGES)]
        ),
        "threads": f"PyTorch {torch.get_num_threads()}, OMP_NUM_THREADS {os.environ.get('OMP_NUM_THREADS', 'not set')}",
        "load": f"{os.getloadavg()[0]:.1f} processes waiting or running as the benchmarks began",
    }


def processor_name() -> str:
    """As the kernel names it, with family and model number: virtual machines often hide the rest."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    name = fields.get("model name", platform.machine())
    return f"{name} (family {fields.get('cpu family', '?')}, model {fields.get('model', '?')})"
