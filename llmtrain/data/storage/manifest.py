"""The storage format of a data set: tar shards of token ids, one index sidecar per shard, and a manifest.

A shard is a WebDataset tar with one member `<key>.bin` per document: its token ids, little-endian, nothing else; and a
second one where targets.py says so. A sidecar holds where payloads lie, so that no headers are read. What a sample is
follows from the document lengths alone: the documents of a shard, each followed by one end-of-sequence id, form a
stream, and samples are windows of the streams of all shards, or of each alone. Imports no torch.
"""

import errno
import hashlib
import json
import os
import struct
from collections import Counter
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Annotated, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import (
    AfterValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictStr,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from pydantic.dataclasses import dataclass

from llmtrain.data.storage.targets import ChatRecord, LabelsRecord, Targets
from llmtrain.errors import DataError
from llmtrain.files import SEAL, open_regular, parse_json, read_bytes, replace_file, sealed, unsealed
from llmtrain.words import fault_text

MANIFEST_NAME = "manifest.json"
TOKENIZER_NAMES = ("tokenizer.model", "tokenizer.json")
"""Names of the tokenizer that is kept in a data set's folder, or beside it."""
LONGEST_TOKENIZER = 256 << 20
SCHEMA_VERSION = 2
UNSEALED_VERSION = 1
"""Manifests of data sets that were written before manifests had a hash of their own."""
MANIFEST_BYTES = 256 << 20
"""A manifest has 400 bytes for each shard."""
DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4"), "uint64": np.dtype("<u8")}
"""Stored types. We write the narrowest of the first two; files of others may have 64 bits, of which ids need few."""

_INDEX_MAGIC = b"LLMTINDX"
_INDEX_COLUMNS = {1: 2, 2: 4}
"""Numbers of a document by the version of a sidecar: place and size of its ids, and of its second member if any."""
NO_FILE = (errno.EISDIR, errno.EINVAL, errno.ELOOP, errno.EFBIG)
"""Errors that tell of something else in a file's place. Other errors of the system may pass."""
LONGEST_INDEX = 256 << 20
"""Bytes of a sidecar with sixteen million documents. No tokenizer is longer either."""
_INDEX_HEADER = struct.Struct("<8sQ")  # magic, version; then offset and size of each payload, uint64, little-endian

Verify = Literal["off", "first", "always"]


class DamagedFileError(DataError):
    """A file is missing, or is not what the manifest says: a fact that every rank finds alike.

    `actual` is what was found instead, in few words; `reason` is missing, size, sha256 or index. A file that cannot be
    read for the moment raises DataError instead.
    """

    def __init__(self, message: str, reason: str, actual: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.actual = actual


def _plain_name(name: str) -> str:
    """A manifest may come from elsewhere: it must not name files outside its folder."""
    if name in ("", ".", "..") or any(character in name for character in "/\\\0"):
        raise ValueError("must be a plain name, without folders")
    return name


def _known_dtype(name: str) -> str:
    if name not in DTYPES:
        raise ValueError(f"must be one of {', '.join(DTYPES)}")
    return name


FileName = Annotated[StrictStr, AfterValidator(_plain_name)]
Count = Annotated[int, Field(strict=True, ge=0)]
KNOWN_KEYS = ConfigDict(extra="forbid")


@dataclass(frozen=True, config=KNOWN_KEYS)
class ShardEntry:
    """The manifest's entry for one shard. `samples` counts documents; `tokens` leaves out the ends of sequence."""

    file: FileName
    bytes: Count
    sha256: StrictStr
    index_file: FileName
    index_sha256: StrictStr
    samples: Count
    tokens: Count

    @property
    def stream_tokens(self) -> int:
        """Tokens of the shard's stream, ends of sequence included."""
        return self.tokens + self.samples

    def num_windows(self, seq_len: int) -> int:
        """Number of whole windows of seq_len + 1 tokens, each sharing one token with the next."""
        return max(0, (self.stream_tokens - 1) // seq_len)


@dataclass(frozen=True, config=KNOWN_KEYS)
class Manifest:
    """The parts of a data set, and the tokenizer that its ids belong to.

    The keys with a default are left out of the file where they have it: data sets of before have none of them.
    """

    schema_version: Count
    """As it was read; the newest is what is written."""
    tokenizer_sha256: StrictStr
    vocab_size: Count
    dtype: Annotated[StrictStr, AfterValidator(_known_dtype)]
    eos_id: Count
    shards: tuple[ShardEntry, ...]
    bos_ids: tuple[Count, ...] = ()
    """Stored before the tokens of every document, and counted among them."""
    settings_sha256: StrictStr = ""
    """Hash of the tokenizer_settings.json that lies beside the tokenizer."""
    lossy: StrictBool = False
    """True where the tokenizer does not give texts back as they were, such as without their line breaks."""
    container: Literal["tar", "npy", "megatron"] = "tar"
    """Shards are tars of .bin members, tars of .npy members, or Megatron's files of documents one behind another."""
    targets: Targets = "none"
    """The second member of every document."""
    chat: ChatRecord | None = None
    labels: LabelsRecord | None = None

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Self:
        """Ids fit the vocabulary and the dtype, and no file is named twice."""
        if not self.eos_id < self.vocab_size <= np.iinfo(DTYPES[self.dtype]).max + 1:
            raise ValueError(
                f"eos_id = {self.eos_id}, vocab_size = {self.vocab_size}, dtype = {self.dtype}: "
                "eos_id must be below vocab_size, and every id must fit the dtype"
            )
        if any(token >= self.vocab_size for token in self.bos_ids):
            raise ValueError(f"bos_ids = {list(self.bos_ids)}: must be ids below vocab_size = {self.vocab_size}")
        if (self.chat is not None, self.labels is not None) != (self.targets == "trained", self.targets == "labels"):
            raise ValueError(
                f"targets = {self.targets}: trained has chat beside it, labels has labels, none has neither"
            )
        if self.targets != "none" and self.container != "tar":
            raise ValueError(f"targets = {self.targets}, container = {self.container}: only a tar has second members")
        names = [name for shard in self.shards for name in (shard.file, shard.index_file)]
        name, count = Counter(names).most_common(1)[0] if names else ("", 0)
        if count > 1:
            raise ValueError(f"the same file is named twice: {name!r}")
        return self

    def num_windows(self, seq_len: int) -> int:
        """Number of windows that lie in one shard."""
        return sum(shard.num_windows(seq_len) for shard in self.shards)

    @property
    def stream_tokens(self) -> int:
        """Tokens of all shards, ends of sequence included."""
        return sum(shard.stream_tokens for shard in self.shards)

    @property
    def num_documents(self) -> int:
        return sum(shard.samples for shard in self.shards)

    @property
    def num_tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards)


OPTIONAL = {field.name: field.default for field in fields(Manifest) if field.default is not MISSING}
"""Keys of a manifest that may be absent, with what their absence means."""


_MANIFEST = TypeAdapter(Manifest)


def dtype_name(vocab_size: int) -> str:
    """The narrowest stored type that holds every id of a vocabulary."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write a folder's manifest.json, sealed; the same manifest gives the same bytes."""
    content = {**asdict(manifest), "schema_version": SCHEMA_VERSION}
    content = sealed({key: value for key, value in content.items() if key not in OPTIONAL or value != OPTIONAL[key]})
    replace_file(folder / MANIFEST_NAME, (json.dumps(content, indent=1) + "\n").encode())


def read_manifest(folder: str | Path) -> Manifest:
    """Read and check a folder's manifest.json. Raises DataError where it is missing or not what it should be."""
    path = Path(folder) / MANIFEST_NAME
    try:
        content = read_bytes(path, MANIFEST_BYTES)
    except OSError as error:
        reason = "there is no such file" if isinstance(error, FileNotFoundError) else error.strerror
        raise DataError(
            f"{path}: {reason}. A data set is a folder written by `llmtrain data shards`; "
            f"for a folder of tar shards, `llmtrain data index {folder}` writes the manifest."
        ) from None
    return parse_manifest(content, str(path))


def parse_manifest(content: bytes, location: str) -> Manifest:
    """A manifest from its bytes, checked. Raises DataError that names `location` where it is not what it should be."""
    try:
        raw = parse_json(content)
    except ValueError as error:
        raise DataError(
            f"{location}: not JSON ({error}). Copy the data set again, or write its shards again."
        ) from None
    try:
        version = raw.get("schema_version") if isinstance(raw, dict) else None
        if version not in (UNSEALED_VERSION, SCHEMA_VERSION):
            raise ValueError(f"schema_version = {version!r}: this version of llmtrain reads up to {SCHEMA_VERSION}")
        if (SEAL in raw) != (version == SCHEMA_VERSION):
            raise ValueError(f"schema_version = {version}: {'has no' if version == SCHEMA_VERSION else 'has a'} {SEAL}")
        manifest = _MANIFEST.validate_python({key: value for key, value in raw.items() if key != SEAL})
        unsealed(raw)  # after the form, whose errors name keys: a seal only says that something differs
    except ValueError as error:
        fault = fault_text(error) if isinstance(error, ValidationError) else str(error)
        raise DataError(f"{location}: {fault}. Write the shards again, or copy the file again.") from None
    return manifest


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def index_bytes(payloads: NDArray[np.uint64]) -> bytes:
    """A sidecar's content from an array [documents, 2] of payload offset and size, or [documents, 4] of two each."""
    version = next(version for version, columns in _INDEX_COLUMNS.items() if columns == payloads.shape[1])
    return _INDEX_HEADER.pack(_INDEX_MAGIC, version) + payloads.astype("<u8").tobytes()


def read_index(path: Path) -> NDArray[np.uint64]:
    """Array [documents, 2] of payload offset and size; [documents, 4] where they have a second member.

    Raises DamagedFileError where the sidecar is missing or torn.
    """
    try:
        content = read_bytes(path, LONGEST_INDEX)
    except FileNotFoundError:
        message = f"{path}: missing. `llmtrain data index {path.parent}` rebuilds it from the shard."
        raise DamagedFileError(message, "missing", f"no {path.name}") from None
    except OSError as error:
        if error.errno not in NO_FILE:
            raise
        message = f"{path}: {error.strerror}. Delete it; `llmtrain data index {path.parent}` rebuilds it."
        raise DamagedFileError(message, "index", f"{path.name}: {error.strerror}") from None
    body = content[_INDEX_HEADER.size :]
    magic, version = _INDEX_HEADER.unpack_from(content) if len(content) >= _INDEX_HEADER.size else (_INDEX_MAGIC, 1)
    columns = _INDEX_COLUMNS.get(version, 2)
    if len(content) < _INDEX_HEADER.size or len(body) % (8 * columns):
        expected = f"{_INDEX_HEADER.size} bytes and {8 * columns} for each document"
        message = f"{path}: expected {expected}, actual {len(content)} bytes: it is cut short. Delete it; "
        message += f"`llmtrain data index {path.parent}` rebuilds it."
        raise DamagedFileError(message, "index", f"{path.name} of {len(content)} bytes")
    if magic != _INDEX_MAGIC or version not in _INDEX_COLUMNS:
        known, found = [(_INDEX_MAGIC, known) for known in _INDEX_COLUMNS], (magic, version)
        message = f"{path}: expected one of {known} at its begin, actual {found}: not a shard index."
        raise DamagedFileError(message, "index", f"{path.name} begins with {found}")
    return np.frombuffer(body, "<u8").reshape(-1, columns)


def check_file(path: Path, size_bytes: int | None = None, sha256: str | None = None) -> None:
    """Compare a file with what the manifest says: a hash without a size is that of a sidecar or a tokenizer.

    Raises DamagedFileError that names file, expected and actual.
    """
    try:
        with open_regular(path) as file:
            actual_bytes = os.fstat(file.fileno()).st_size
        if size_bytes is not None and actual_bytes != size_bytes:
            message = f"{path}: expected {size_bytes} bytes, actual {actual_bytes} bytes. Copy the file again."
            raise DamagedFileError(message, "size", f"{actual_bytes} bytes")
        if sha256 is not None and size_bytes is None and actual_bytes > LONGEST_INDEX:
            raise OSError(errno.EFBIG, f"it has {actual_bytes:,} bytes, more than such a file can have")
        if sha256 is not None and (actual := file_sha256(path)) != sha256:
            message = f"{path}: expected sha256 {sha256}, actual {actual}. Copy the file again."
            raise DamagedFileError(message, "sha256", actual)
    except FileNotFoundError:
        message = f"{path}: missing, but the manifest names it. Copy the data set again."
        raise DamagedFileError(message, "missing", f"no {path.name}") from None
    except OSError as error:
        if error.errno not in NO_FILE:
            raise
        message = f"{path}: {error.strerror}. Copy the data set again."
        raise DamagedFileError(message, "size", f"{path.name}: {error.strerror}") from None
