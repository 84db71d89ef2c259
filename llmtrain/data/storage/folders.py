"""The place of a data set: a folder of a file system, or a URL. Imports no torch."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from platformdirs import user_cache_path

from llmtrain.config.data import DataConfig
from llmtrain.config.reading.credentials import without_credentials
from llmtrain.data.storage.cache import HeldFile
from llmtrain.data.storage.manifest import (
    MANIFEST_NAME,
    TOKENIZER_NAMES,
    DamagedFileError,
    Manifest,
    ShardEntry,
    check_file,
    file_sha256,
    parse_manifest,
    read_index,
    read_manifest,
)
from llmtrain.data.storage.remote import SCHEMES, FetchConfig, RemoteFolder, retried, scheme_of
from llmtrain.data.storage.shard_file import ShardFile, ShardPaths
from llmtrain.data.token_roles import SETTINGS_NAME, settings_tokenizer
from llmtrain.errors import ConfigError, DataError

LOCAL_ATTEMPTS = 5
"""How often a file of a file system is tried."""


class LocalFolder:
    """A data set in a folder that every rank sees."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __str__(self) -> str:
        return str(self.path)

    def location(self, name: str) -> str:
        return str(self.path / name)

    def read_manifest(self) -> Manifest:
        return read_manifest(self.path)

    def open_shard(self, manifest: Manifest, number: int, hashed: bool) -> ShardFile:
        """Raises DamagedFileError where the shard is not what the manifest says, DataError where it cannot be read."""
        action = partial(ShardFile, self.path, manifest, number, hashed)
        return retried(action, LOCAL_ATTEMPTS, self.location(manifest.shards[number].file))

    def read_sidecar(self, manifest: Manifest, number: int) -> NDArray[np.uint64]:
        """[documents, 2], places and sizes in a shard, compared with the manifest. Raises as `open_shard` does."""
        entry = manifest.shards[number]
        action = partial(_checked_sidecar, self.path / entry.index_file, entry)
        return retried(action, LOCAL_ATTEMPTS, self.location(entry.index_file))


class CachedFolder:
    """A data set behind a URL, whose shards come through this machine's cache."""

    def __init__(self, remote: RemoteFolder) -> None:
        self.remote = remote

    def __str__(self) -> str:
        return str(self.remote)

    def location(self, name: str) -> str:
        return self.remote.location(name)

    def read_manifest(self) -> Manifest:
        """Raises DamagedFileError where there is none, DataError where it cannot be had or is wrong."""
        return parse_manifest(self.remote.read(MANIFEST_NAME), self.location(MANIFEST_NAME))

    def open_shard(self, manifest: Manifest, number: int, hashed: bool) -> ShardFile:
        """Raises as LocalFolder does. Files are hashed while they arrive, and with `hashed` also those in the cache."""
        entry = manifest.shards[number]
        fetch = self.remote.fetch
        index = self._held(partial(fetch, entry.index_file, entry.index_sha256, None, hashed))
        tar = self._held(partial(fetch, entry.file, entry.sha256, entry.bytes, hashed))
        try:
            paths = ShardPaths(tar.path, index.path)
            return ShardFile(tar.path.parent, manifest, number, hashed=False, paths=paths, held=tar)
        except DamagedFileError as damage:
            message = f"{self.location(entry.file)}, in the cache as {damage}"
            raise DamagedFileError(message, damage.reason, damage.actual) from None
        finally:
            index.release()

    def read_sidecar(self, manifest: Manifest, number: int) -> NDArray[np.uint64]:
        """Raises as LocalFolder's does."""
        entry = manifest.shards[number]
        index = self._held(partial(self.remote.fetch, entry.index_file, entry.index_sha256))
        try:
            return _checked_sidecar(index.path, entry)
        finally:
            index.release()

    def _held(self, fetch: Callable[[], Path]) -> HeldFile:
        try:
            return HeldFile(fetch)
        except OSError as error:
            raise DataError(f"{error.filename}: cannot be read: {error.strerror}. Check data.cache_dir.") from None


def _checked_sidecar(path: Path, entry: ShardEntry) -> NDArray[np.uint64]:
    check_file(path, None, entry.index_sha256)
    payloads = read_index(path)
    if len(payloads) != entry.samples:
        raise DataError(f"{path}: has {len(payloads)} documents, and the manifest says {entry.samples}. Index again.")
    return payloads


DataFolder = LocalFolder | CachedFolder


def open_folder(path: str | Path, fetch: FetchConfig | None = None) -> DataFolder:
    """The place that a source's path names. Raises ConfigError for a scheme that nothing is fetched with."""
    scheme = scheme_of(str(path))
    if scheme is None:
        return LocalFolder(Path(path))
    fault = scheme_fault(str(path))
    if fault is not None:
        raise ConfigError(f"{without_credentials(str(path))}: {fault}")
    return CachedFolder(RemoteFolder(str(path), fetch or FetchConfig(user_cache_path("llmtrain"), 5, 60.0)))


def scheme_fault(path: str) -> str | None:
    """The fault in the scheme of a path; None for one of SCHEMES, and for a path that is not a URL."""
    scheme = scheme_of(path)
    if scheme is None or (scheme in SCHEMES and "://" in path and "::" not in path):
        return None
    written = f"{scheme}: is not a scheme" if scheme not in SCHEMES else "is not a URL"
    allowed = ", ".join(f"{name}://" for name in SCHEMES)
    return f"{written} that data is fetched with. Allowed are {allowed} and paths of folders, written without a scheme."


def fetch_config(data: DataConfig) -> FetchConfig:
    """How a run fetches."""
    cache_dir = Path(data.cache_dir) if data.cache_dir else user_cache_path("llmtrain")
    limit_bytes = None if data.cache_limit_gb is None else int(data.cache_limit_gb * 1e9)
    return FetchConfig(cache_dir, data.fetch_attempts, data.fetch_timeout_seconds, limit_bytes)


def find_tokenizer(folder: str | Path, sha256: str | None = None) -> Path:
    """The tokenizer kept in a data set's folder or beside it; the one with the hash that the manifest says.

    Raises ConfigError where there is none, DamagedFileError where none has that hash.
    """
    folder = Path(folder)
    candidates = [place / name for place in (folder, folder.absolute().parent) for name in TOKENIZER_NAMES]
    found = [path for path in candidates if os.path.lexists(path)]
    if not found:
        names = ", ".join(TOKENIZER_NAMES)
        raise ConfigError(f"{folder}: neither it nor the folder above holds one of {names}. Name one.")
    if sha256 is None:
        return found[0]
    faults = []
    for path in found:
        try:
            check_file(path, None, sha256)
            return path
        except DamagedFileError as damage:
            faults.append(damage)
    raise faults[0]


def run_tokenizer(data: DataConfig, manifest: Manifest) -> Path:
    """The run's tokenizer: the one it names, or the one kept with its first training source, whose manifest is given.

    Raises ConfigError where there is none, DamagedFileError where it is not the manifest's.
    """
    if data.tokenizer:
        check_file(Path(data.tokenizer), None, manifest.tokenizer_sha256)
        return Path(data.tokenizer)
    folder = open_folder(data.train[0].path, fetch_config(data))
    if isinstance(folder, LocalFolder):
        return find_tokenizer(folder.path, manifest.tokenizer_sha256)
    return fetch_tokenizer(data, manifest)


def run_settings(data: DataConfig, manifest: Manifest) -> Path | None:
    """The settings file of the run's tokenizer: the one that lies with its first training source, or beside the
    tokenizer that it names. Raises DataError where the manifest tells of one that is not there or another one."""
    folder = open_folder(data.train[0].path, fetch_config(data))
    if isinstance(folder, CachedFolder):
        return _fetched_settings(folder.remote, manifest.settings_sha256) if manifest.settings_sha256 else None
    places = [folder.path, folder.path.absolute().parent, *([Path(data.tokenizer).parent] if data.tokenizer else [])]
    found = [place / SETTINGS_NAME for place in places if (place / SETTINGS_NAME).is_file()]
    if not manifest.settings_sha256:
        return next((path for path in found if settings_tokenizer(path) == manifest.tokenizer_sha256), None)
    right = next((path for path in found if file_sha256(path) == manifest.settings_sha256), None)
    if right is None:
        what = f"{found[0]} is another one" if found else "neither it nor the folder above holds one"
        raise DataError(
            f"{folder}: its manifest tells of a {SETTINGS_NAME} with the sha256 {manifest.settings_sha256}, and "
            f"{what}. Copy the data set again, with the files beside its splits."
        )
    return right


def _fetched_settings(remote: RemoteFolder, sha256: str) -> Path:
    for place in (remote, remote.parent):
        try:
            return place.fetch(SETTINGS_NAME, sha256)
        except DamagedFileError:
            continue
    raise DataError(
        f"{remote}: neither it nor the folder above holds the {SETTINGS_NAME} of its manifest (sha256 {sha256}). Copy "
        "the data set again, with the files beside its splits."
    )


def fetch_tokenizer(data: DataConfig, manifest: Manifest) -> Path:
    """The tokenizer kept with the first training source, a URL. Raises ConfigError where there is not the right one."""
    remote = RemoteFolder(data.train[0].path, fetch_config(data))
    for place in (remote, remote.parent):
        for name in TOKENIZER_NAMES:
            try:
                return place.fetch(name, manifest.tokenizer_sha256)
            except DamagedFileError:
                continue
    raise ConfigError(
        f"{remote}: neither it nor the folder above holds a {' or '.join(TOKENIZER_NAMES)} with the sha256 "
        f"{manifest.tokenizer_sha256} of its manifest. Set data.tokenizer to that file."
    )
