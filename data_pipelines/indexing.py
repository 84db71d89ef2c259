"""Finding the documents in tar shards, strictly: making sidecars and manifests for tars that are already there."""

import os
import tarfile
from collections.abc import Sequence
from functools import partial
from io import BufferedReader
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_pipelines.tokenizer import lost_in_texts
from llmtrain.data.storage.manifest import (
    DTYPES,
    MANIFEST_NAME,
    SCHEMA_VERSION,
    DamagedFileError,
    Manifest,
    ShardEntry,
    check_file,
    dtype_name,
    file_sha256,
    index_bytes,
    read_index,
    read_manifest,
    write_manifest,
)
from llmtrain.data.storage.shard_file import TAR_BLOCK_BYTES
from llmtrain.data.token_roles import SETTINGS_NAME
from llmtrain.errors import ConfigError, DataError
from llmtrain.files import open_regular, replace_file
from llmtrain.values.tokenizer import Tokenizer

Payloads = NDArray[np.uint64]
"""Offset and size [documents, 2] of the members of a tar."""


def stored_dtype(shards: Sequence[tuple[Path, Payloads]], vocab_size: int, asked: str | None) -> str:
    """The type of the ids in a folder: the one asked for, or the narrowest for the vocabulary.

    Wider ids than that can be read as narrow ones, with a zero behind each. Raises ConfigError where that is what they
    look like and nobody has said so, DataError where no type fits.
    """
    usual = dtype_name(vocab_size)
    if asked is not None:
        if np.iinfo(DTYPES[asked]).max + 1 < vocab_size:
            raise ConfigError(
                f"--dtype {asked}: does not hold all ids of a vocabulary of {vocab_size:,}. Write the ids as {usual}."
            )
        return asked
    folder = shards[0][0].parent
    width = _width(shards)
    if width == 8:
        raise DataError(
            f"{folder}: the ids look like 64-bit ones: the last four of eight bytes are 0. Write them as {usual}, or "
            f"say --dtype {usual} if they are just that."
        )
    if width == 4 and usual == "uint16":
        raise ConfigError(
            f"{folder}: the ids look like uint32, though a vocabulary of {vocab_size:,} needs uint16 only: every "
            "second pair of bytes is 0. Say which they are: --dtype uint32, or --dtype uint16 if every second token is "
            "id 0."
        )
    return usual


def _width(shards: Sequence[tuple[Path, Payloads]]) -> int | None:
    """8 or 4 where all documents are ids of so many bytes whose upper halves are 0; None where they are not."""
    used = np.zeros(4, bool)
    sizes = np.concatenate([payloads[:, 1] for _, payloads in shards])
    for path, payloads in shards:
        content = np.memmap(path, np.uint8, mode="r")
        for offset, size in payloads.tolist():
            pairs = content[offset : offset + size // 2 * 2].view("<u2")
            used |= [bool(pairs[place::4].any()) for place in range(4)]
        if (sizes % 4).any() or (used[1] and used[3]):
            return None
    if not used[0]:
        return None
    if not (sizes % 8).any() and not used[2] and not used[3]:
        return 8
    return None if used[1] or used[3] else 4


def without_ends(path: Path, payloads: Payloads, dtype: np.dtype, eos_id: int) -> Payloads:
    """The same places where documents that bring their own end of sequence stop before it.

    The stream puts one behind every document: they would have two.
    """
    content = np.memmap(path, np.uint8, mode="r")
    trimmed = payloads.copy()
    for number, (offset, size) in enumerate(payloads.tolist()):
        last = content[offset + size - dtype.itemsize : offset + size] if size >= dtype.itemsize else content[:0]
        if len(last) and int(last.view(dtype)[0]) == eos_id:
            trimmed[number, 1] -= np.uint64(dtype.itemsize)
    return trimmed


TOKEN_SUFFIX = ".bin"
_END_BLOCK_BYTES = _LONGEST_HEADER = 1 << 20


def scan_tar(path: Path) -> NDArray[np.uint64]:
    """Offset and size [documents, 2] of each `.bin` member of a tar, found by reading headers only.

    Members of other kinds are passed over unread. Raises DataError where the archive is cut or damaged anywhere: the
    usual readers take a damaged header for the end, and lose the rest without a word.
    """
    payloads: list[tuple[int, int]] = []
    last_key = None
    try:
        with open_regular(path) as file, tarfile.open(fileobj=_HeaderFile(file.raw), mode="r:") as tar:
            while (member := tar.next()) is not None:
                # The library would keep every header in memory.
                tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue]  documented, but not in typeshed
                if not member.name.endswith(TOKEN_SUFFIX):
                    continue
                if not member.isreg() or member.issparse():
                    raise DataError(f"{path}: member {member.name} is not a plain file. Write the shard again.")
                # As webdataset groups members: by the path up to the first dot of its last part.
                place, _, last = member.name.rpartition("/")
                key = f"{place}/{last.partition('.')[0]}"
                if key == last_key:
                    raise DataError(f"{path}: {key} has two {TOKEN_SUFFIX} members; a document has one.")
                payloads.append((member.offset_data, member.size))
                last_key = key
            end = tar.offset
    except (tarfile.TarError, OSError, ValueError) as error:
        raise DataError(f"{path}: not a whole tar archive ({error}). Copy the file again.") from None
    _check_end(path, end)
    return np.array(payloads, np.uint64).reshape(-1, 2)


class _HeaderFile(BufferedReader):
    """A tar of which headers alone are read. What one claims to be its own rest, a long name say, is bounded."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= _LONGEST_HEADER:
            raise tarfile.ReadError(f"a header at byte {self.tell()} claims {size} bytes of its own")
        return super().read(size)


def _check_end(path: Path, end: int) -> None:
    """An archive ends with two blocks of zeros, and nothing but zeros follows."""
    with open_regular(path) as file:
        # The reader stands behind the first block that it took for the end, or before it: both lie in the zeros.
        size_bytes = os.fstat(file.fileno()).st_size
        begin = file.seek(min(end, size_bytes))
        clean = not any(block.strip(b"\0") for block in iter(partial(file.read, _END_BLOCK_BYTES), b""))
    if not clean:
        raise DataError(
            f"{path}: expected the end of the archive at byte {end}, actual {size_bytes - begin} bytes follow that are "
            "no valid member: a header is damaged or cut. Copy the file again."
        )
    if size_bytes - begin < 2 * TAR_BLOCK_BYTES:
        raise DataError(
            f"{path}: expected {2 * TAR_BLOCK_BYTES} bytes of zeros at the end of the archive, actual "
            f"{size_bytes - begin}: it is cut short. Copy the file again."
        )


def rebuild_sidecars(folder: Path) -> int:
    """Write the sidecars that are missing or damaged, from shards that are as the manifest says; return how many.

    Raises DataError where a shard itself is damaged.
    """
    manifest = read_manifest(folder)
    rebuilt = 0
    for entry in manifest.shards:
        index_path = folder / entry.index_file
        if _is_whole(index_path, entry.index_sha256):
            continue
        check_file(folder / entry.file, entry.bytes, entry.sha256)
        replace_file(index_path, index_bytes(scan_documents(folder / entry.file, manifest, entry)))
        check_file(index_path, None, entry.index_sha256)
        rebuilt += 1
    return rebuilt


def _is_whole(path: Path, sha256: str) -> bool:
    try:
        check_file(path, None, sha256)
    except DamagedFileError:
        return False
    return True


def scan_documents(path: Path, manifest: Manifest, entry: ShardEntry) -> NDArray[np.uint64]:
    """Offset and size of each document of a data set's shard, which may end before an end of sequence of its own."""
    payloads = scan_tar(path)
    dtype = DTYPES[manifest.dtype]
    if int(payloads[:, 1].sum()) // dtype.itemsize == entry.tokens:
        return payloads
    trimmed = without_ends(path, payloads, dtype, manifest.eos_id)
    return trimmed if int(trimmed[:, 1].sum()) // dtype.itemsize == entry.tokens else payloads


def index_folder(folder: Path, tokenizer: Tokenizer, dtype: str | None = None) -> tuple[Manifest, int]:
    """Write sidecars and a manifest for a folder of tars whose `.bin` members hold ids of this tokenizer.

    `dtype` is that of the ids; by default uint16 for vocabularies up to 65,536, else uint32. Returns the number of
    documents, too, that bring their own end of sequence: it counts as the one that follows every document. Raises
    DataError where the folder has no tar, or a tar is damaged or holds other ids, ConfigError where `dtype` must be
    said.
    """
    paths = sorted(folder.glob("*.tar"))
    if not paths:
        raise DataError(f"{folder}: holds no .tar file. Name a folder of tar shards.")
    shards = [(path, _members(path)) for path in paths]
    name = stored_dtype(shards, tokenizer.vocab_size, dtype)
    entries, ended = [], 0
    for path, payloads in shards:
        _require_ids(path, payloads, DTYPES[name], tokenizer.vocab_size)
        documents = without_ends(path, payloads, DTYPES[name], tokenizer.eos_id)
        ended += int((documents[:, 1] != payloads[:, 1]).sum())
        entries.append(_index_shard(path, documents, DTYPES[name]))
    bos_ids = tokenizer.around[0] if tokenizer.roles.bos_ids is None else tokenizer.roles.bos_ids
    if bos_ids and not all(_all_begin_with(path, bos_ids, DTYPES[name]) for path in paths):
        bos_ids = ()
    beside = (place / SETTINGS_NAME for place in (folder, folder.absolute().parent))
    settings = next((file_sha256(path) for path in beside if path.is_file()), "")
    meaning = (tokenizer.sha256, tokenizer.vocab_size, name, tokenizer.eos_id)
    lossy = bool(lost_in_texts(tokenizer))
    manifest = Manifest(SCHEMA_VERSION, *meaning, tuple(entries), bos_ids, settings, lossy)
    write_manifest(folder, manifest)
    return manifest, ended


def _members(path: Path) -> NDArray[np.uint64]:
    payloads = scan_tar(path)
    if not len(payloads):
        raise DataError(f"{path}: has no {TOKEN_SUFFIX} member. Documents are members named KEY{TOKEN_SUFFIX}.")
    return payloads


def _require_ids(path: Path, payloads: NDArray[np.uint64], dtype: np.dtype, vocab_size: int) -> None:
    """Raise DataError where members do not hold ids of this type and vocabulary."""
    odd = np.flatnonzero(payloads[:, 1] % dtype.itemsize)
    if odd.size:
        raise DataError(
            f"{path}: document {odd[0]} has {payloads[odd[0], 1]} bytes, no multiple of {dtype.itemsize}: its ids are "
            f"not {dtype.name}, as a vocabulary of {vocab_size} wants, or as --dtype says."
        )
    if problems := token_problems(path, payloads, dtype, vocab_size):
        raise DataError(f"{problems[0]} Or its ids are not little-endian {dtype.name}: --dtype says another type.")


def _index_shard(path: Path, documents: NDArray[np.uint64], dtype: np.dtype) -> ShardEntry:
    index_path = path.with_suffix(".idx")
    replace_file(index_path, index_bytes(documents))
    return ShardEntry(
        path.name,
        path.stat().st_size,
        file_sha256(path),
        index_path.name,
        file_sha256(index_path),
        len(documents),
        int(documents[:, 1].sum()) // dtype.itemsize,
    )


def _all_begin_with(path: Path, bos_ids: tuple[int, ...], dtype: np.dtype) -> bool:
    """True if every document of an indexed shard begins with these ids."""
    places = read_index(path.with_suffix(".idx")).tolist()
    tokens, size = np.memmap(path, np.uint8, mode="r"), len(bos_ids) * dtype.itemsize
    starts = (tokens[offset : offset + min(size, length)].view(dtype) for offset, length in places)
    return all(tuple(start.tolist()) == bos_ids for start in starts)


def token_problems(path: Path, payloads: NDArray[np.uint64], dtype: np.dtype, vocab_size: int) -> list[str]:
    """One line for each document with an id that the vocabulary does not have."""
    problems = []
    tokens = np.memmap(path, np.uint8, mode="r")
    for number, (offset, size) in enumerate(payloads.tolist()):
        largest = int(tokens[offset : offset + size // dtype.itemsize * dtype.itemsize].view(dtype).max(initial=0))
        if largest >= vocab_size:
            problems.append(
                f"{path}: document {number} has token id {largest}, but the vocabulary has {vocab_size}. "
                "Write the shards again with their own tokenizer."
            )
    return problems


def has_manifest(folder: Path) -> bool:
    """True for the folder of a data set."""
    return (folder / MANIFEST_NAME).is_file()
