"""The run folder, to which one process at a time writes.

Whether the owner of a lock still lives is known exactly on its own machine, by process id and start time. On another
machine only the lease tells: the owner touches the lock every ten seconds. The choice between two processes that
both find a dead owner is made by an advisory lock (flock) on a second file, held only for the takeover.
"""

import atexit
import json
import os
import socket
import threading
import time
import uuid
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
from pydantic import TypeAdapter

from llmtrain.errors import DataError, LlmtrainError, RunFolderInUseError
from llmtrain.files import read_json, sealed
from llmtrain.runs import audit
from llmtrain.runs.file_system import UNSUPPORTED, FileVersion, file_version, lock_file, no_links_text
from llmtrain.runs.status import STATUS, Pid, RunStatus, Status, next_action, read_status

LOCK = "run.lock"
RENEW_SECONDS = 10.0
LEASE_SECONDS = 60.0
READ_SECONDS = 1.0


@dataclass(frozen=True)
class LockOwner:
    """The process that a lock names. `machine` tells apart boots and containers in which process ids differ."""

    host: str
    machine: str
    pid: Pid
    process_started: str
    since: str
    token: str
    launch_id: str = ""


_FIELDS = TypeAdapter(LockOwner)


class RunFolder:
    """A run folder that this process alone writes to, from construction until `close` or the end of the process.

    `attempt` is which of its launcher's attempts writes. A launcher whose earlier ranks are all gone, or cut off, gives
    its attempts one `launch_id`: the lock of an earlier one is taken over at once. `verdict` is the last judgement of
    the run's health, an earlier owner's to begin with; it goes into every status. Raises RunFolderInUseError where
    another process holds it, LlmtrainError where it cannot be made.
    """

    def __init__(self, path: Path, attempt: int = 0, launch_id: str = "") -> None:
        self.path = Path(path)
        self._attempt = attempt
        self.verdict = ""
        self._lock = self.path / LOCK
        self._read_version: FileVersion | None = None
        """That of the lock when it was read last, and was this process's, at the time `_read_at`."""
        self._read_at = 0.0
        self._owner = LockOwner(
            socket.gethostname(),
            this_machine(),
            os.getpid(),
            process_start(os.getpid()) or "",
            _now(),
            uuid.uuid4().hex,
            launch_id,
        )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._acquire()
        except OSError as error:
            if error.errno in UNSUPPORTED and error.filename2:
                raise LlmtrainError(no_links_text(self.path, error)) from error
            if os.path.lexists(self._lock) and not self._lock.is_file():
                raise DataError(
                    f"{self._lock}: {error.strerror}. If no process trains in this folder, remove it."
                ) from error
            raise LlmtrainError(
                f"{error.filename or self.path}: the run folder cannot be used: {error.strerror}. "
                "Set output_dir to a folder that can be written."
            ) from error
        # Only the holder may clear up: files of other names belong to whoever waits for the lock.
        self._clear_unfinished()
        with suppress(LlmtrainError):  # a damaged status is replaced by the next one
            before = read_status(self.path)
            self.verdict = before.verdict if before else ""
        self._closed = threading.Event()
        self._renewal = threading.Thread(target=self._renew, name="run-lock", daemon=True)
        self._renewal.start()
        atexit.register(self.close)

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the lock. A forked child changes nothing: the lock is its parent's."""
        if self._owner.pid != os.getpid() or self._closed.is_set():
            return
        # The renewal ends first: it must not touch a lock that is another's by then.
        self._closed.set()
        self._renewal.join()
        atexit.unregister(self.close)
        if self._is_ours():
            self._lock.unlink(missing_ok=True)

    def ensure_held(self) -> None:
        """Raise RunFolderInUseError where the lock was lost: this machine was suspended for longer than the lease.

        To be asked before anything in the folder is changed: what another process has written since must stay. Rows
        are written many times a second: a lock that is the same file as when it was read is not read again. A file
        system of the network may say so of a file that is another by now, and so it is read every READ_SECONDS.
        """
        try:
            seen, now = file_version(self._lock), time.monotonic()
            if seen is not None and seen == self._read_version and now - self._read_at < READ_SECONDS:
                return
            owner = read_owner(self._lock)
        except OSError:  # that the lock cannot be read for a moment is no sign of another owner
            return
        if owner is None:
            raise RunFolderInUseError(
                f"{self._lock}: this run's lock was removed or spoiled: another process may write here. Stopped "
                "without writing. See that no other process trains in this folder, then start the same command again."
            )
        if owner.token != self._owner.token:
            raise RunFolderInUseError(
                f"{self.path}: taken over by process {owner.pid} on {owner.host} since {owner.since}, while this one "
                f"gave no sign of life for more than {LEASE_SECONDS:.0f} seconds. Stopped without writing: the other "
                "process has the run now."
            )
        self._read_version, self._read_at = seen, now  # of before it was read: a change since then shows next time

    @property
    def lock_token(self) -> str:
        """The token that tells this owner from all others, for `was_taken_over` on the run's other ranks."""
        return self._owner.token

    def record(self, event: str, **facts: Any) -> None:
        """Append an event to the run's audit log, as `audit.record`. Raises RunFolderInUseError and OSError."""
        self.ensure_held()
        audit.record(self.path, event, **facts)

    def write_status(self, status: Status, step: int, total_steps: int, message: str = "", cause: str = "") -> None:
        """Replace `status.json` in one step.

        Raises RunFolderInUseError where the lock was lost, LlmtrainError where the file system does not take it.
        """
        self.ensure_held()
        content = RunStatus(
            status,
            step,
            total_steps,
            message,
            self._owner.pid,
            self._owner.host,
            _now(),
            self._attempt,
            cause,
            next_action=next_action(status, step, total_steps),
            verdict=self.verdict,
        )
        temporary = self.path / f".{STATUS}.{self._owner.token}"
        try:
            temporary.write_text(json.dumps(sealed(asdict(content)), indent=1) + "\n", "utf-8")
            temporary.replace(self.path / STATUS)
        except OSError as error:
            with suppress(OSError):  # a full disk takes the name and not the content
                temporary.unlink(missing_ok=True)
            if (self.path / STATUS).is_dir():
                raise DataError(f"{self.path / STATUS}: is a folder, where a file is to be. Remove it.") from error
            raise LlmtrainError(
                f"{self.path / STATUS}: cannot be written: {error.strerror}. Free space there."
            ) from error

    def _acquire(self) -> None:
        # The lock appears with its content in it, by link or rename: nobody ever reads half a lock.
        mine = self.path / f".{LOCK}.{self._owner.token}"
        try:
            mine.write_text(json.dumps(asdict(self._owner), indent=1) + "\n", "utf-8")
            while True:
                try:
                    self._lock.hardlink_to(mine)
                    return
                except FileExistsError:
                    pass
                self._require_stale(mine)
                if self._take_over(mine):
                    return
        finally:
            mine.unlink(missing_ok=True)

    def _clear_unfinished(self) -> None:
        """Remove what writers that were killed have left of a status, and of locks that they never got."""
        now = time.time()
        for path in (*self.path.glob(f".{STATUS}.*"), *self.path.glob(f".{LOCK}.*")):
            with suppress(OSError):
                # Who holds the lock alone writes the status. Others may be waiting for the lock right now, each with a
                # file of its own: one that is old belongs to a process that died before it could remove it.
                if path.name.startswith(f".{STATUS}.") or (
                    path.name != f".{LOCK}.takeover" and now - path.stat().st_mtime > 10 * LEASE_SECONDS
                ):
                    path.unlink()

    def _take_over(self, mine: Path) -> bool:
        """Replace a stale lock. False where it vanished meanwhile."""
        with (self.path / f".{LOCK}.takeover").open("w") as guard:
            lock_file(guard.fileno(), self._lock)
            # Another process may have taken over while this one waited: look again before replacing.
            # A link to nothing is something that stands there, too.
            if not os.path.lexists(self._lock):
                return False
            self._require_stale(mine)
            mine.replace(self._lock)
            return True

    def _require_stale(self, mine: Path) -> None:
        """Return where the lock's owner is dead or the lock is gone; raise RunFolderInUseError where it lives."""
        owner = read_owner(self._lock)
        if owner is not None and owner.launch_id and owner.launch_id == self._owner.launch_id:
            return
        if owner is not None and owner.machine == self._owner.machine and owner.host == self._owner.host:
            if process_start(owner.pid) in (owner.process_started, ""):
                raise _in_use(self.path, owner)
            return
        # Another machine's clock does not matter: both times are the file system's.
        os.utime(mine)
        try:
            idle_seconds = mine.stat().st_mtime - self._lock.stat().st_mtime
        except FileNotFoundError:
            return
        if idle_seconds < LEASE_SECONDS:
            raise _in_use(self.path, owner)

    def _renew(self) -> None:
        while not self._closed.wait(RENEW_SECONDS):
            # A file system that fails for a moment is no reason to stop training: the lease has five more tries.
            try:
                if self._is_ours():
                    os.utime(self._lock)
            except OSError:
                continue

    def _is_ours(self) -> bool:
        owner = read_owner(self._lock)
        return owner is not None and owner.token == self._owner.token


def was_taken_over(run_dir: Path, token: str) -> bool:
    """True where a run folder has another owner than the one with that token, which other ranks cannot ask."""
    try:
        owner = read_owner(run_dir / LOCK)
    except OSError:
        return False
    return owner is not None and owner.token != token


def read_owner(lock: Path) -> LockOwner | None:
    """The owner of the lock; None where the lock is gone or cannot be understood."""
    try:
        owner = LockOwner(**read_json(lock))
        _FIELDS.validate_json(json.dumps(asdict(owner)), strict=True)
    except (FileNotFoundError, ValueError, TypeError):
        return None
    return owner


def _in_use(path: Path, owner: LockOwner | None) -> RunFolderInUseError:
    if owner is None:
        return RunFolderInUseError(
            f"{path}: is in use: {LOCK} is younger than {LEASE_SECONDS:.0f} seconds and cannot be understood. "
            "Wait a minute and start again."
        )
    return RunFolderInUseError(
        f"{path}: is in use by process {owner.pid} on {owner.host} since {owner.since}. Wait for it, stop it "
        f"(`kill {owner.pid}` on {owner.host}), or choose another name or output_dir. A process that died on another "
        f"machine frees the folder {LEASE_SECONDS:.0f} seconds later by itself."
    )


def process_start(pid: int) -> str | None:
    """When a process started, as a text to compare; None where none is alive, empty where the system hides it.

    On Linux in clock ticks since boot, which a change of the system's clock does not move.
    """
    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return None
        if psutil.LINUX:
            # The second field is the command in parentheses, which may hold spaces; the start is field 22.
            fields = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()
            return fields[19]
        return str(process.create_time())
    except (psutil.Error, OSError):
        return "" if psutil.pid_exists(pid) else None


def this_machine() -> str:
    """This boot of this machine, and the namespace that its process ids belong to; empty where Linux does not say."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
