"""What the kernel's control groups let this process have: containers, systemd and batch systems set it. Pure.

Version 2 has one tree of groups, version 1 one per controller. A process may use what the least of its group and the
groups around it allow. Within a container its own group may be seen as the root of the tree.
"""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

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
