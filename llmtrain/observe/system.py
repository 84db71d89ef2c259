"""What the machine of the rank that records is doing: processors, memory, network, disks, its GPU."""

import time
from collections.abc import Callable

import psutil
import torch

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
"""Who counts bytes since the machine was started, and under which names."""

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
    """Of this rank's GPU. Some of it needs NVIDIA's management library for Python, and leave to ask it."""
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
