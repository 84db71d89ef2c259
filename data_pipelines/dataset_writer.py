"""Writing the folder of a data set: a place beside its destination, then for each split its shards and manifest.

The place goes away however the writing ends. A signal that asks to stop ends the writing like an error. What a process
could not clear, because it was killed or the machine went down, the next one that writes there does: a lock tells
whether anybody still writes.
"""

import glob
import hashlib
import logging
import os
import shutil
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any, Literal, Self

import numpy as np
from filelock import lock_descriptor
from numpy.typing import NDArray
from webdataset.writer import TarWriter

from data_pipelines.tokenizer import lost_in_texts
from llmtrain.data.storage.manifest import (
    DTYPES,
    SCHEMA_VERSION,
    Manifest,
    ShardEntry,
    dtype_name,
    file_sha256,
    index_bytes,
    write_manifest,
)
from llmtrain.data.storage.shard_file import TAR_BLOCK_BYTES
from llmtrain.data.storage.targets import ChatRecord, LabelsRecord, Targets, stored_targets
from llmtrain.data.token_roles import settings_text
from llmtrain.values.tokenizer import Tokenizer

_logger = logging.getLogger(__name__)

STOPPING = (signal.SIGTERM, signal.SIGHUP)


@contextmanager
def work_folder(out: Path) -> Iterator[Path]:
    """An empty folder beside `out`. The caller renames it to `out`; where it does not, the folder is removed."""
    out = out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    _clear_abandoned(out)
    folder = out.with_name(f".{out.name}.writing-{os.getpid()}")
    with _stopping_raises():
        folder.mkdir()
        try:
            lock = os.open(folder, os.O_RDONLY)
            try:
                # A file system without locks, such as some of the network, keeps what is abandoned.
                with suppress(OSError):
                    lock_descriptor(lock, blocking=False)
                yield folder
            finally:
                os.close(lock)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _clear_abandoned(out: Path) -> None:
    for folder in sorted(out.parent.glob(f".{glob.escape(out.name)}.writing-*")):
        with suppress(OSError):
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                if lock_descriptor(lock, blocking=False):
                    shutil.rmtree(folder)
                    _logger.info("removed %s: what an interrupted command had begun to write", folder)
            finally:
                os.close(lock)


@contextmanager
def _stopping_raises() -> Iterator[None]:
    """Signals that would end the process at once end it as an exception, with the exit code that shells expect."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    heard = [number for number in STOPPING if signal.getsignal(number) != signal.SIG_IGN]  # as nohup sets it
    before = {number: signal.signal(number, stop) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass(frozen=True)
class ShardingConfig:
    """How a data set is cut. Shards hold about `shard_tokens` tokens: one ends with the document that reaches that."""

    valid_fraction: float = 0.1
    shard_tokens: int = 50_000_000
    num_workers: int = 1
    overwrite: bool = False
    bos: Literal["auto", "none"] = "auto"
    """auto: each document begins with what the tokenizer puts before a text. none: with nothing."""


@dataclass(frozen=True)
class TargetsWriting:
    """The second member that every document of a data set gets, and how its ids begin.

    `bos_ids` are those with which the documents that are handed in begin themselves: nothing is put before them.
    `record` makes of the counts of all documents of a split what its manifest is to tell of them.
    """

    kind: Literal["trained", "labels"]
    record: Callable[[Mapping[str, int]], ChatRecord | LabelsRecord]
    bos_ids: tuple[int, ...] = ()


def bos_ids_of(tokenizer: Tokenizer, bos: Literal["auto", "none"]) -> tuple[int, ...]:
    """The ids that every document is to begin with."""
    if bos == "none":
        return ()
    return tokenizer.around[0] if tokenizer.roles.bos_ids is None else tokenizer.roles.bos_ids


def settings_of(tokenizer: Tokenizer, bos_ids: tuple[int, ...]) -> str | None:
    """The tokenizer_settings.json of a data set; None where the tokenizer's own file says all of it."""
    if tokenizer.path.suffix != ".json" and not tokenizer.roles.files and tokenizer.roles.eos_id is None:
        return None
    roles = tokenizer.roles.of_the_tokenizer().as_trained(tokenizer.eos_id, bos_ids)
    return settings_text(roles, tokenizer.sha256)


def sha256_of(settings: str | None) -> str:
    """The entry of a manifest for a settings file."""
    return "" if settings is None else hashlib.sha256(settings.encode()).hexdigest()


class DatasetWriter:
    """Writes one split: cuts its documents into shards and keeps the manifest's entries."""

    def __init__(
        self, folder: Path, tokenizer: Tokenizer, config: ShardingConfig, targets: TargetsWriting | None = None
    ) -> None:
        folder.mkdir()
        self.num_documents = 0
        self._folder = folder
        self._tokenizer = tokenizer
        self._shard_tokens = config.shard_tokens
        self._targets = targets
        self._counts = Counter[str]()
        self._bos_ids = bos_ids_of(tokenizer, config.bos) if targets is None else targets.bos_ids
        self._dtype = dtype_name(tokenizer.vocab_size)
        self._entries: list[ShardEntry] = []
        self._shard: ShardWriter | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._shard is not None:
            self._shard.abandon()

    def add(
        self, ids: NDArray[Any], targets: NDArray[np.int64] | None = None, counts: Mapping[str, int] | None = None
    ) -> None:
        """Append a document; with the spans or labels of its ids where all have some, and what is counted of them."""
        if self._shard is None:
            name = f"shard-{len(self._entries):06d}"
            kind = "none" if self._targets is None else self._targets.kind
            self._shard = ShardWriter(self._folder, name, DTYPES[self._dtype], kind)
        if self._targets is None and self._bos_ids:
            ids = np.concatenate((self._bos_ids, ids))
        self._shard.add(f"{self.num_documents:09d}", ids, targets)
        self._counts.update(counts or {})
        self.num_documents += 1
        if self._shard.num_tokens >= self._shard_tokens:
            self._entries.append(self._shard.finish())
            self._shard = None

    def finish(self) -> Manifest:
        if self._shard is not None:
            self._entries.append(self._shard.finish())
            self._shard = None
        manifest = Manifest(
            SCHEMA_VERSION,
            self._tokenizer.sha256,
            self._tokenizer.vocab_size,
            self._dtype,
            self._tokenizer.eos_id,
            tuple(self._entries),
            self._bos_ids,
            sha256_of(settings_of(self._tokenizer, self._bos_ids)),
            bool(lost_in_texts(self._tokenizer)),
        )
        if self._targets is not None:
            record, kind = self._targets.record(self._counts), self._targets.kind
            manifest = replace(manifest, targets=kind, **{"chat" if kind == "trained" else "labels": record})
        write_manifest(self._folder, manifest)
        return manifest


class ShardWriter:
    """Writes one tar and its sidecar. The same documents give the same bytes: members carry no time and no owner."""

    def __init__(self, folder: Path, name: str, dtype: np.dtype[Any], targets: Targets = "none") -> None:
        """With `targets`, every document has a second member of that kind."""
        self.num_tokens = 0
        self._path = folder / f"{name}.tar"
        self._index_path = folder / f"{name}.idx"
        self._dtype = dtype
        self._kind: Targets = targets
        self._payloads: list[tuple[int, ...]] = []
        self._file = self._path.open("wb")
        self._tar = TarWriter(self._file, user="", group="", mtime=0, encoder=False)

    def add(self, key: str, ids: NDArray[Any], targets: NDArray[np.int64] | None = None) -> None:
        """Append a document as the member `key`.bin, and its spans or labels as a second one."""
        assert (targets is None) == (self._kind == "none")
        places = self._member(key, "bin", ids.astype(self._dtype).tobytes())
        if targets is not None:
            places += self._member(key, self._kind, stored_targets(targets, self._kind))
        self._payloads.append(places)
        self.num_tokens += len(ids)

    def _member(self, key: str, kind: str, payload: bytes) -> tuple[int, int]:
        """Write a member; where its payload lies."""
        self._tar.write({"__key__": key, kind: payload})
        # `offset` is the TarFile's own, which is not documented: it stands behind the payload and its padding now.
        padded_bytes = -(-len(payload) // TAR_BLOCK_BYTES) * TAR_BLOCK_BYTES
        return self._tar.tarstream.offset - padded_bytes, len(payload)

    def finish(self) -> ShardEntry:
        """Close the files and say what the manifest needs to know of them."""
        self._tar.close()
        self._file.close()
        columns = 2 if self._kind == "none" else 4
        self._index_path.write_bytes(index_bytes(np.array(self._payloads, np.uint64).reshape(-1, columns)))
        return ShardEntry(
            self._path.name,
            self._path.stat().st_size,
            file_sha256(self._path),
            self._index_path.name,
            file_sha256(self._index_path),
            len(self._payloads),
            self.num_tokens,
        )

    def abandon(self) -> None:
        """Close the files after an error, which a full disk must not hide behind its own."""
        with suppress(OSError):
            self._tar.close()
        with suppress(OSError):
            self._file.close()
