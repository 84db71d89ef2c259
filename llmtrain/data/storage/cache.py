"""The files of the cache that are read, and those that make room for others.

Whoever reads a file of the cache holds a shared lock on it (flock) for as long. Only a file that nobody holds is
deleted: a mapped file would stay readable, but its space would not be free before its last reader ends, and the next
one would fetch it again. Processes and runs share a cache without knowing of each other, with a limit or without.
"""

import fcntl
import logging
import os
import re
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from llmtrain.errors import DataError

_logger = logging.getLogger(__name__)

_SHARD = re.compile(r"[0-9a-f]{64}\.(tar|bin|idx)")
"""Names of shards and sidecars in the cache. Everything else is small, and stays."""

MOST_ATTEMPTS = 100
"""How often a file is fetched again that another process has deleted before it could be held."""

_warned: set[Path] = set()


class HeldFile:
    """A file of the cache that nobody deletes while this object, or a process forked meanwhile, is there."""

    def __init__(self, fetch: Callable[[], Path]) -> None:
        """Hold the file that `fetch` finds or makes. Raises OSError, DataError, and what `fetch` does."""
        for _ in range(MOST_ATTEMPTS):
            self.path = fetch()
            try:
                descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                continue
            if _locked(descriptor, fcntl.LOCK_SH) and not os.fstat(descriptor).st_nlink:
                os.close(descriptor)  # deleted before it was held
                continue
            self.release = weakref.finalize(self, os.close, descriptor)
            return
        raise DataError(f"{self.path}: other processes delete it as soon as it is fetched. Raise data.cache_limit_gb.")


def make_room(cache_dir: Path, limit_bytes: int, coming_bytes: int, keep: Path) -> None:
    """Delete shards and sidecars that nobody reads, the least recently used first, until what is coming fits.

    `keep` is what is coming. Where too much is being read, more than the limit is kept, and said once.
    """
    found = sorted(_files(cache_dir, keep), key=lambda file: file.used_at)
    total = coming_bytes + sum(file.size_bytes for file in found)
    for file in found:
        if total <= limit_bytes:
            return
        if _deleted(file.path):
            total -= file.size_bytes
    if total > limit_bytes and cache_dir not in _warned:
        _warned.add(cache_dir)
        _logger.warning(
            "%s: %.3f GB are kept, more than data.cache_limit_gb = %.3f: so much is being read at once. Lower "
            "data.shuffle_shards, or raise the limit.", cache_dir, total / 1e9, limit_bytes / 1e9,
        )  # fmt: skip


@dataclass(frozen=True)
class _File:
    path: Path
    size_bytes: int
    used_at: int


def _files(cache_dir: Path, keep: Path) -> list[_File]:
    found = []
    with os.scandir(cache_dir) as entries:
        for entry in entries:
            if _SHARD.fullmatch(entry.name) and entry.name != keep.name:
                try:
                    about = entry.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue  # another process has made room
                found.append(_File(Path(entry.path), about.st_size, about.st_mtime_ns))
    return found


def _deleted(path: Path) -> bool:
    """Delete a file, unless somebody holds it; whether it is gone."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return True
    except OSError:
        return False  # of another user
    try:
        if not _locked(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB):
            return False
        path.unlink(missing_ok=True)  # under the lock: who opened it before notices that it is gone
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)


def _locked(descriptor: int, kind: int) -> bool:
    """False where it is held otherwise, or the file system has no locks: then nothing is deleted there either."""
    try:
        fcntl.flock(descriptor, kind)
        return True
    except OSError:
        return False
