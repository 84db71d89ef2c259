"""Data sets behind a URL: small files are read whole, shards are kept in a cache of this machine.

A cached file's name is its hash, so that runs share it and a data set that was written again has other files. Only
complete files of the right hash get that name. What may pass, of a server or of a shared file system, is tried again.
"""

import errno
import hashlib
import os
import random
import re
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, TypeVar
from urllib.parse import quote, urlsplit, urlunsplit

from filelock import FileLock

from llmtrain.config.reading.credentials import without_credentials
from llmtrain.data.storage.cache import make_room
from llmtrain.data.storage.manifest import DamagedFileError, file_sha256
from llmtrain.errors import DataError

Result = TypeVar("Result")

FIRST_PAUSE_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 30.0

PASSING_ERRORS = frozenset(
    (
        errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EINTR, errno.EBUSY, errno.ENFILE, errno.EMFILE,
        errno.ECONNRESET, errno.ECONNREFUSED, errno.ECONNABORTED, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN,
    )
)  # fmt: skip
"""Errors of the system that say nothing about the file: the next try may succeed."""


class PassingFaultError(Exception):
    """Something that may be gone at the next try; `final` is what to raise where it is not."""

    def __init__(self, message: str, final: DataError | None = None) -> None:
        super().__init__(message)
        self.final = final


def retried(action: Callable[[], Result], attempts: int, subject: str) -> Result:
    """The result of an action, called up to `attempts` times with growing random pauses while its faults may pass.

    `subject` names in messages what is read. Raises DataError where the last try failed too, or a fault will not pass.
    """
    attempt = 0
    while True:
        attempt += 1
        try:
            return action()
        except PassingFaultError as fault:
            reason, final = str(fault), fault.final
        except OSError as error:
            reason, final = error.strerror or str(error), None
            if error.errno not in PASSING_ERRORS:
                raise DataError(f"{subject}: cannot be read: {reason}. Check the file and its rights.") from None
        if attempt >= attempts:
            raise final or DataError(
                f"{subject}: cannot be read: {reason} ({attempts} attempts). The same command continues once it can; "
                "data.fetch_attempts and data.fetch_timeout_seconds say how patient a run is."
            )
        time.sleep(pause_seconds(attempt))


def pause_seconds(attempt: int) -> float:
    """The pause after a failed attempt (from 1): doubled each time, and random, so that ranks do not come together."""
    return min(LONGEST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2 ** (attempt - 1)) * random.uniform(0.5, 1.0)


SCHEMES = ("https", "http", "s3", "gs", "hf")
"""Schemes that a data set may be fetched with, and no others: some libraries run a command for `pipe:`."""

EXTRAS = {"s3": "llmtrain[s3]", "gs": "llmtrain[gs]"}

PARTIAL = ("fetching", "lock")
"""Endings of what is beside a file while it is fetched. Not .part: earlier versions lock a file of this name itself."""

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
_CHUNK_BYTES = 1 << 20
_LATER = (408, 425, 429)
"""Answers from 400 on that mean: not now."""


@dataclass(frozen=True)
class FetchConfig:
    """The folder of fetched files, the number of attempts, and the longest silence in seconds.

    Shards beyond `limit_bytes` make room for others; None: they are kept.
    """

    cache_dir: Path
    attempts: int
    timeout_seconds: float
    limit_bytes: int | None = None


def scheme_of(path: str) -> str | None:
    """The scheme of a URL, in small letters; None for a path, also for one that exists and has a colon in it."""
    match = _SCHEME.match(path)
    if match is None or ("://" not in path and Path(path).exists()):
        return None
    return match[1].lower()


def shown_path(path: str) -> str:
    """A source's path as it may be printed."""
    return without_credentials(path) if scheme_of(path) else path


class RemoteFolder:
    """The files below a URL of one of SCHEMES."""

    def __init__(self, url: str, config: FetchConfig) -> None:
        self._parts = urlsplit(url)
        self._config = config
        self._file_system: Any = None

    def __str__(self) -> str:
        return without_credentials(urlunsplit(self._parts))

    def location(self, name: str) -> str:
        """The URL of a file, to show."""
        return without_credentials(self._url(name))

    @property
    def parent(self) -> "RemoteFolder":
        parts = self._parts._replace(path=self._parts.path.rstrip("/").rpartition("/")[0])
        return RemoteFolder(urlunsplit(parts), self._config)

    def read(self, name: str) -> bytes:
        """A whole file. Raises DamagedFileError where there is none, DataError where it cannot be had."""
        return retried(lambda: b"".join(self._iter_chunks(name)), self._config.attempts, self.location(name))

    def fetch(self, name: str, sha256: str, size_bytes: int | None = None, check_cached: bool = True) -> Path:
        """A file of this machine with the content that its hash says.

        It is fetched where the cache has none, or, with `check_cached`, another one under that name. Processes of one
        machine wait for each other rather than fetch the same file twice. Raises DamagedFileError where the server has
        none or another one, DataError where it cannot be had or kept.
        """
        cache_dir = self._config.cache_dir
        final = cache_dir / f"{sha256}{Path(name).suffix}"
        part, lock = (final.with_suffix(f"{final.suffix}.{kind}") for kind in PARTIAL)
        download = _Download(self.location(name), sha256, size_bytes)
        try:
            cache_dir.mkdir(parents=True, exist_ok=True)
            if download.is_in(final, check_cached):
                with suppress(OSError):  # of another user, or deleted meanwhile: who opens it fetches it again
                    os.utime(final)  # it is used now
                return final
            # A file system without locks is an error: the library's other locks outlive a killed process.
            with FileLock(lock, fallback_to_soft=False):
                try:
                    # Another process may have fetched it meanwhile.
                    if not download.is_in(final, check_cached):
                        if self._config.limit_bytes is not None:
                            make_room(cache_dir, self._config.limit_bytes, size_bytes or 0, final)
                        self._fetch_to(part, name, download)
                        part.replace(final)
                finally:
                    part.unlink(missing_ok=True)
                    lock.unlink(missing_ok=True)  # who waits for it notices, and makes a new one
        except OSError as error:
            raise _not_written(error.filename or cache_dir, error) from None
        return final

    def _fetch_to(self, part: Path, name: str, download: "_Download") -> None:
        with part.open("wb") as file:
            retried(partial(self._fetch_once, name, download, file), self._config.attempts, download.location)
            file.flush()
            os.fsync(file.fileno())

    def _fetch_once(self, name: str, download: "_Download", file: IO[bytes]) -> None:
        try:
            download.into(file, self._iter_chunks(name))
        except OSError as error:
            raise _not_written(self._config.cache_dir, error) from None

    def _url(self, name: str) -> str:
        if self._parts.scheme.lower() in ("http", "https"):
            name = quote(name)
        return urlunsplit(self._parts._replace(path=f"{self._parts.path.rstrip('/')}/{name}"))

    def _iter_chunks(self, name: str) -> Iterator[bytes]:
        """The content of a file, as it arrives. Raises what `_fault` makes of the library's errors."""
        try:
            if self._file_system is None:
                self._file_system = file_system(self._parts.scheme.lower(), self._config.timeout_seconds)
            # A size and no block size make the HTTP library stream, without asking for the size before.
            options = {"size": 1, "block_size": 0} if self._parts.scheme.lower() in ("http", "https") else {}
            with self._file_system.open(self._url(name), "rb", **options) as file:
                while chunk := file.read(_CHUNK_BYTES):
                    yield chunk
        # Each library has errors of its own, without a common base.
        except Exception as error:
            raise fault_of(self.location(name), error, self._config.timeout_seconds) from None


def file_system(scheme: str, timeout_seconds: float) -> Any:
    """fsspec's file system of one of SCHEMES, whose servers may be silent for so long. Raises the library's errors."""
    import fsspec

    options: dict[str, Any] = {}
    if scheme in ("http", "https"):
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=timeout_seconds, sock_read=timeout_seconds)
        # The environment may name a proxy.
        options = {"client_kwargs": {"timeout": timeout, "trust_env": True}}
    elif scheme == "s3":
        options = {"config_kwargs": {"connect_timeout": timeout_seconds, "read_timeout": timeout_seconds}}
    return fsspec.filesystem(scheme, skip_instance_cache=True, **options)


def fault_of(location: str, error: Exception, timeout_seconds: float) -> Exception:
    """Our own error for one of a library's, at a URL as it may be shown: gone, refused, or worth another try."""
    if isinstance(error, FileNotFoundError):
        message = f"{location}: there is no such file (404). Check the address, or copy the data set again."
        return DamagedFileError(message, "missing", "404")
    if isinstance(error, ImportError):
        extra = EXTRAS.get(scheme_of(location) or "", "huggingface_hub")
        return DataError(f"{location}: needs a library that is not installed. Try `pip install '{extra}'`.")
    response = getattr(error, "response", None)
    status = getattr(error, "status", None) or getattr(error, "code", None) or getattr(response, "status_code", None)
    if isinstance(error, PermissionError) or (isinstance(status, int) and 400 <= status < 500 and status not in _LATER):
        answer = f"the server answers {status}" if status else "access is denied"
        return DataError(f"{location}: {answer}. Check the address and the rights of this account.")
    if isinstance(status, int):
        return PassingFaultError(f"the server answers {status}")
    if isinstance(error, TimeoutError):
        return PassingFaultError(f"the server is silent for {timeout_seconds:g} seconds")
    # The text of other errors may hold the whole URL.
    system_error = getattr(error, "os_error", error)
    text = system_error.strerror if isinstance(system_error, OSError) else None
    return PassingFaultError(f"{type(error).__name__}{f', {text}' if text else ''}")


@dataclass(frozen=True)
class _Download:
    """The file that is expected."""

    location: str
    sha256: str
    size_bytes: int | None

    def is_in(self, path: Path, check: bool) -> bool:
        """True where a file is this one already: by its name and size, with `check` by its content too."""
        if not path.is_file() or (self.size_bytes is not None and path.stat().st_size != self.size_bytes):
            return False
        return not check or file_sha256(path) == self.sha256

    def into(self, file: IO[bytes], chunks: Iterator[bytes]) -> None:
        """Write what arrives, hashed on the way. Raises PassingFaultError where it is not this file; OSError."""
        file.seek(0)
        file.truncate()
        digest, received = hashlib.sha256(), 0
        for chunk in chunks:
            digest.update(chunk)
            received += len(chunk)
            if self.size_bytes is not None and received > self.size_bytes:
                break
            file.write(chunk)
        if self.size_bytes is not None and received != self.size_bytes:
            actual = f"{'more than ' if received > self.size_bytes else ''}{min(received, self.size_bytes)} bytes"
            raise self._wrong("size", f"{self.size_bytes} bytes", actual)
        if (actual := digest.hexdigest()) != self.sha256:
            raise self._wrong("sha256", f"sha256 {self.sha256}", actual)

    def _wrong(self, reason: str, expected: str, actual: str) -> PassingFaultError:
        message = f"expected {expected}, actual {actual}"
        final = f"{self.location}: {message}. Copy the file to the server again."
        return PassingFaultError(message, DamagedFileError(final, reason, actual))


def _not_written(path: object, error: OSError) -> DataError:
    return DataError(f"{path}: cannot be written: {error.strerror}. Set data.cache_dir to a folder with enough space.")
