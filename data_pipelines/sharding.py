"""From documents to a data set: tokens in tar shards, split into train and valid, with index and manifest."""

import hashlib
import shutil
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from webdataset.writer import TarWriter

from data_pipelines.cutting import tokenized
from data_pipelines.round_trip import lost_in_texts
from data_pipelines.splits import SPLITS, require_all, split_documents, splits_of
from data_pipelines.work_folder import work_folder
from llmtrain.data.storage.manifest import (
    DTYPES,
    MANIFEST_NAME,
    SCHEMA_VERSION,
    Manifest,
    ShardEntry,
    dtype_name,
    file_sha256,
    index_bytes,
    write_manifest,
)
from llmtrain.data.token_roles import SETTINGS_NAME, settings_text
from llmtrain.errors import ConfigError
from llmtrain.files import replace_folder
from llmtrain.values.tokenizer import Tokenizer

_TAR_BLOCK_BYTES = 512


@dataclass(frozen=True)
class ShardingConfig:
    """How a data set is cut. Shards hold about `shard_tokens` tokens: one ends with the document that reaches that."""

    valid_fraction: float = 0.1
    shard_tokens: int = 50_000_000
    num_workers: int = 1
    overwrite: bool = False
    bos: Literal["auto", "none"] = "auto"
    """auto: each document begins with what the tokenizer puts before a text. none: with nothing."""


def bos_ids_of(tokenizer: Tokenizer, bos: Literal["auto", "none"]) -> tuple[int, ...]:
    """What every document is to begin with."""
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
    """What a manifest says of a settings file."""
    return "" if settings is None else hashlib.sha256(settings.encode()).hexdigest()


def write_shards(
    documents: Iterable[str], out: Path, tokenizer: Tokenizer, config: ShardingConfig
) -> dict[str, Manifest]:
    """Tokenize documents into OUT/train and OUT/valid and return their manifests.

    The files depend only on documents, tokenizer and sizes, not on the number of workers. OUT appears whole or not
    at all; with a valid_fraction of 0 there is no OUT/valid. Raises ConfigError where OUT is in use, and where a split
    would be empty.
    """
    if not 0 <= config.valid_fraction < 1:
        raise ConfigError(
            f"--valid-fraction {config.valid_fraction}: must be at least 0 and below 1, such as 0.1; with 0 there is "
            "no valid split"
        )
    kept = _tokenizers_in(out, tokenizer)
    _check_output(out, config.overwrite, kept)
    with work_folder(out) as temporary:
        manifests = _write_splits(documents, temporary, tokenizer, config)
        for name in {f"tokenizer{tokenizer.path.suffix}", *kept}:
            shutil.copyfile(tokenizer.path, temporary / name)
        if (settings := settings_of(tokenizer, bos_ids_of(tokenizer, config.bos))) is not None:
            (temporary / SETTINGS_NAME).write_text(settings, "utf-8")
        _publish(temporary, out)
    return manifests


def _write_splits(
    documents: Iterable[str], folder: Path, tokenizer: Tokenizer, config: ShardingConfig
) -> dict[str, Manifest]:
    texts = split_documents(documents, config.valid_fraction)
    with ExitStack() as opened:
        writers = {
            name: opened.enter_context(_DatasetWriter(folder / name, tokenizer, config))
            for name in splits_of(config.valid_fraction)
        }
        for split, ids in tokenized(texts, tokenizer, config.num_workers):
            writers[split].add(ids)
        require_all({name: writer.num_documents for name, writer in writers.items()}, config.valid_fraction)
        return {name: writer.finish() for name, writer in writers.items()}


def _tokenizers_in(out: Path, tokenizer: Tokenizer) -> set[str]:
    """Names of the files in OUT that are this tokenizer: it may have been trained there, and stays."""
    files = [path for path in out.iterdir() if path.is_file()] if out.is_dir() else []
    return {path.name for path in files if file_sha256(path) == tokenizer.sha256}


def _is_kept(path: Path, kept: set[str]) -> bool:
    """Whether a file in OUT is the tokenizer, or says something of it and is written again."""
    return path.name in kept or (bool(kept) and path.name == SETTINGS_NAME)


def _check_output(out: Path, overwrite: bool, kept: set[str]) -> None:
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out}: is a file; the shards need a folder. Name another one.")
    if not out.exists() or all(_is_kept(path, kept) for path in out.iterdir()):
        return
    if not overwrite:
        raise ConfigError(f"{out}: is not empty. Name another folder, or replace what it holds with --overwrite.")
    # What is replaced is deleted: never anything but shards.
    if not (out / SPLITS[0] / MANIFEST_NAME).is_file():
        raise ConfigError(f"{out}: holds no shards written before, so it is not overwritten. Name another folder.")


def _publish(temporary: Path, out: Path) -> None:
    """Put the finished folder in place of `out`."""
    old = temporary.with_name(f"{temporary.name}.old")
    replace_folder(temporary, out, old)
    if old.exists():
        shutil.rmtree(old)


class _DatasetWriter:
    """Writes one split: cuts its documents into shards and keeps the manifest's entries."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, config: ShardingConfig) -> None:
        folder.mkdir()
        self.num_documents = 0
        self._folder = folder
        self._tokenizer = tokenizer
        self._shard_tokens = config.shard_tokens
        self._bos_ids = bos_ids_of(tokenizer, config.bos)
        self._dtype = dtype_name(tokenizer.vocab_size)
        self._entries: list[ShardEntry] = []
        self._shard: ShardWriter | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._shard is not None:
            self._shard.abandon()

    def add(self, ids: NDArray[Any]) -> None:
        if self._shard is None:
            name = f"shard-{len(self._entries):06d}"
            self._shard = ShardWriter(self._folder, name, DTYPES[self._dtype])
        self._shard.add(f"{self.num_documents:09d}", np.concatenate((self._bos_ids, ids)) if self._bos_ids else ids)
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
        write_manifest(self._folder, manifest)
        return manifest


class ShardWriter:
    """Writes one tar and its sidecar. The same documents give the same bytes: members carry no time and no owner."""

    def __init__(self, folder: Path, name: str, dtype: np.dtype[Any]) -> None:
        self.num_tokens = 0
        self._path = folder / f"{name}.tar"
        self._index_path = folder / f"{name}.idx"
        self._dtype = dtype
        self._payloads: list[tuple[int, int]] = []
        self._file = self._path.open("wb")
        self._tar = TarWriter(self._file, user="", group="", mtime=0, encoder=False)

    def add(self, key: str, ids: NDArray[Any]) -> None:
        """Append a document as the member `key`.bin."""
        payload = ids.astype(self._dtype).tobytes()
        self._tar.write({"__key__": key, "bin": payload})
        padded_bytes = -(-len(payload) // _TAR_BLOCK_BYTES) * _TAR_BLOCK_BYTES
        self._payloads.append((self._tar.tarstream.offset - padded_bytes, len(payload)))
        self.num_tokens += len(ids)

    def finish(self) -> ShardEntry:
        """Close the files and say what the manifest needs to know of them."""
        self._tar.close()
        self._file.close()
        self._index_path.write_bytes(index_bytes(np.array(self._payloads, np.uint64).reshape(-1, 2)))
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
