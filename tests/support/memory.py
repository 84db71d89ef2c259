"""How much memory some work takes at its peak."""

import ctypes
from collections.abc import Callable
from pathlib import Path

STATUS = Path("/proc/self/status")
RESET_PEAK = "5"  # proc_pid_clear_refs(5)
M_MMAP_THRESHOLD = -3  # mallopt(3)


def peak_growth(work: Callable[[], object]) -> int:
    """Bytes by which this process grows at most while it works: its resident memory, mapped files included.

    Linux only. To be called in a fresh process: one that has freed memory before may keep it and hide what is taken.
    Large pieces that are freed go back at once, so that the figure is what is in use and not how C's library hoards.
    """
    if hasattr(library := ctypes.CDLL(None), "mallopt"):
        library.mallopt(M_MMAP_THRESHOLD, 1 << 20)
    Path("/proc/self/clear_refs").write_text(RESET_PEAK)
    before = _status_bytes("VmRSS")
    work()
    return _status_bytes("VmHWM") - before


def peak_growth_again(work: Callable[[], object]) -> int:
    """As `peak_growth`, of the second time: how much code the first one brings into memory differs by machine."""
    peak_growth(work)
    return peak_growth(work)


def _status_bytes(field: str) -> int:
    (line,) = (line for line in STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024
