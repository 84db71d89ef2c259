"""The demands of a run on its file system: a folder that can be made, locks, and hard links."""

import errno
import fcntl
import os
import tempfile
from pathlib import Path

import psutil

from llmtrain.errors import ConfigError

CONFIG = "config.yaml"
"""A run writes it first: a folder that has it has been written to before."""

UNSUPPORTED = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EINVAL, errno.EXDEV, errno.ENOLCK)
"""How file systems say that they have no links between files, or no locks on them."""

ELSEWHERE = (
    "Set output_dir to a folder on a local disk or on a file system of a cluster (NFS, Lustre, GPFS), and copy "
    "finished runs from there."
)


ANOTHER = "Choose another output_dir."


def existing_folder(wanted: Path) -> Path:
    """The nearest of a path and its parents that is there; what is there may be a file. Raises OSError."""
    wanted = wanted.absolute()
    for path in (wanted, *wanted.parents):
        try:
            path.stat()
        except (FileNotFoundError, NotADirectoryError):
            # What a link leads to may be missing: the folder could not be made in its place.
            if path.is_symlink():
                raise
            continue
        return path
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(wanted))


def folder_fault(wanted: Path) -> str | None:
    """Why runs cannot be written to a folder that is there or has to be made, and what to do; None where they can.

    For a moment there are two empty files in the nearest folder that is there, unless it is the folder of a run: that
    has been locked before, and a check leaves it as it is.
    """
    try:
        place = existing_folder(wanted)
    except OSError as error:
        return f"{_shortened(wanted)} cannot be made: {error.strerror}. {ANOTHER}"
    except ValueError as error:
        return f"{_shortened(wanted)} cannot be a path: {error}. {ANOTHER}"
    if not place.is_dir():
        return f"{place} is a file, so the folder {_shortened(wanted.absolute())} cannot be made. {ANOTHER}"
    if not os.access(place, os.W_OK | os.X_OK):
        return f"{place} may not be written by this user. {ANOTHER[:-1]}, or change its rights."
    return None if (place / CONFIG).is_file() else link_fault(place)


def link_fault(folder: Path) -> str | None:
    """Why the lock of a run cannot be in a folder, which has to be there; None where it can."""
    try:
        number, name = tempfile.mkstemp(prefix=".llmtrain-trial-", dir=folder)
    except OSError:  # a full disk, say: that is told by whoever looks for room
        return None
    link = f"{name}.link"
    try:
        os.link(name, link)
    except OSError as error:
        return no_links_text(folder, error) if error.errno in UNSUPPORTED else None
    finally:
        os.close(number)
        for path in (name, link):
            Path(path).unlink(missing_ok=True)
    return None


def require_place(out: Path) -> None:
    """Raise ConfigError where no folder of that name can be made, before anything is read."""
    above = next(path for path in out.absolute().parents if path.exists() or path.is_symlink())
    if not above.is_dir():
        raise ConfigError(f"{out}: cannot be made, for {above} is not a folder. Choose another place.")
    if not os.access(above, os.W_OK | os.X_OK):
        raise ConfigError(f"{out}: cannot be made, for nothing can be written to {above}. Choose another place.")


def no_links_text(folder: Path, error: OSError) -> str:
    """The message about a folder in which a hard link has failed."""
    return (
        f"{folder} is on {file_system_text(folder)}, which has no hard links ({error.strerror}). A run's lock needs "
        f"them, so that two processes never write to one run. {ELSEWHERE}"
    )


def lock_file(descriptor: int, path: Path) -> None:
    """Wait for an advisory lock on an open file. Raises OSError, with the advice where there are no such locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        text = (
            f"{file_system_text(path.parent)} has no locks on files (flock: {error.strerror}), which the takeover of "
            "a dead process's lock needs"
        )
        raise OSError(error.errno, text, str(path)) from error


def file_system_text(folder: Path) -> str:
    """The file system that a folder is on, as the system describes it."""
    try:
        mounts = psutil.disk_partitions(all=True)
    except OSError:
        mounts = []
    absolute = folder.resolve()
    holding = [mount for mount in mounts if absolute.is_relative_to(mount.mountpoint)]
    if not holding:
        return "a file system"
    nearest = max(holding, key=lambda mount: len(mount.mountpoint))
    return f"the file system at {nearest.mountpoint} ({nearest.fstype})"


def _shortened(path: Path) -> str:
    text = str(path)
    return text if len(text) <= 200 else f"{text[:200]}..."


FileVersion = tuple[int, ...]


def file_version(path: Path) -> FileVersion | None:
    """What changes where a file is replaced or written to; None where there is none."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
