"""Checking a data set completely: every hash, every header, every count, every token."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data_pipelines.indexing import has_manifest, scan_documents, token_problems
from data_pipelines.splits import SPLITS
from llmtrain.data.storage.folders import find_tokenizer
from llmtrain.data.storage.manifest import (
    DTYPES,
    MANIFEST_NAME,
    Manifest,
    ShardEntry,
    check_file,
    file_sha256,
    read_index,
    read_manifest,
)
from llmtrain.data.storage.remote import scheme_of
from llmtrain.data.token_roles import SETTINGS_NAME
from llmtrain.errors import ConfigError, DataError


def datasets_in(folder: Path) -> list[Path]:
    """The data sets that a folder means: itself, or the splits that `llmtrain data shards` wrote into it.

    Raises ConfigError for a URL, and where the folder does not exist or holds neither a manifest nor a shard.
    """
    if (scheme := scheme_of(str(folder))) is not None:
        raise ConfigError(
            f"{scheme}: this command reads folders on a file system, and no URLs. Copy the data set here first; "
            "`llmtrain train` reads it where it is."
        )
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder. Name one written by `llmtrain data shards`.")
    splits = [folder / name for name in SPLITS if (folder / name).is_dir()]
    found = splits if splits and not has_manifest(folder) else [folder]
    if not any(has_manifest(dataset) or any(dataset.glob("*.tar")) for dataset in found):
        near = sorted(path.parent for depth in ("*", "*/*") for path in folder.glob(f"{depth}/{MANIFEST_NAME}"))
        advice = f"Try {near[0]}." if near else "Name one written by `llmtrain data shards`."
        raise ConfigError(f"{folder}: is no data set, it holds neither a {MANIFEST_NAME} nor a .tar file. {advice}")
    return found


def verify_dataset(folder: Path) -> list[str]:
    """Everything that is wrong with a data set, one line each; empty where nothing is."""
    try:
        manifest = read_manifest(folder)
    except DataError as error:
        return [str(error)]
    problems = [problem for entry in manifest.shards for problem in _shard_problems(folder, manifest, entry)]
    problems += _stray_files(folder, manifest)
    problems += _tokenizer_problems(folder, manifest)
    return problems


def _shard_problems(folder: Path, manifest: Manifest, entry: ShardEntry) -> Iterator[str]:
    path, index_path = folder / entry.file, folder / entry.index_file
    checks = ((path, entry.bytes, entry.sha256), (index_path, None, entry.index_sha256))
    for file, size_bytes, sha256 in checks:
        try:
            check_file(file, size_bytes, sha256)
        except DataError as error:
            yield str(error)
    if not path.is_file():
        return
    try:
        payloads = scan_documents(path, manifest, entry)
    except DataError as error:
        yield str(error)
        return
    if index_path.is_file():
        try:
            if not np.array_equal(read_index(index_path), payloads):
                yield f"{index_path}: its places are not those of {entry.file}. Run `llmtrain data index {folder}`."
        except DataError as error:
            yield str(error)
    dtype = DTYPES[manifest.dtype]
    tokens = int(payloads[:, 1].sum()) // dtype.itemsize
    if (len(payloads), tokens) != (entry.samples, entry.tokens):
        yield (
            f"{path}: expected {entry.samples} documents with {entry.tokens} tokens, "
            f"actual {len(payloads)} with {tokens}. Copy the file again."
        )
    yield from token_problems(path, payloads, dtype, manifest.vocab_size)


def _stray_files(folder: Path, manifest: Manifest) -> Iterator[str]:
    known = {entry.file for entry in manifest.shards}
    for path in sorted(folder.glob("*.tar")):
        if path.name not in known:
            yield f"{path}: the manifest does not name it, so nothing reads it. Delete it, or index the folder again."


def _tokenizer_problems(folder: Path, manifest: Manifest) -> Iterator[str]:
    try:
        path = find_tokenizer(folder, manifest.tokenizer_sha256)
    except ConfigError:
        return  # data sets may be kept without a copy of their tokenizer
    except DataError as error:
        yield str(error)
        return
    settings = path.parent / SETTINGS_NAME
    if manifest.settings_sha256 and not settings.is_file():
        yield f"{settings}: missing, but {folder}/manifest.json says that it lies beside the tokenizer. Copy it again."
    elif manifest.settings_sha256 and (actual := file_sha256(settings)) != manifest.settings_sha256:
        yield f"{settings}: expected sha256 {manifest.settings_sha256} as in {folder}/manifest.json, actual {actual}."
