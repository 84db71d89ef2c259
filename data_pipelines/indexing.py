"""Making sidecars and manifests for shards that are already there: our own, and those of others."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from data_pipelines.foreign_shards import NPY_SUFFIX, megatron_files, scan_arrays, scan_indexed
from data_pipelines.tar_members import TOKEN_SUFFIX, iter_members, scan_pairs, scan_tar
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
from llmtrain.data.storage.shard_file import ShardFile
from llmtrain.data.target_sources import WRITTEN_BY
from llmtrain.data.token_roles import SETTINGS_NAME
from llmtrain.errors import ConfigError, DataError
from llmtrain.files import replace_file
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
    if manifest.targets != "none":  # which we alone write, never with an end of sequence of their own
        return scan_pairs(path, f".{manifest.targets}")
    scan = {"tar": scan_tar, "npy": lambda path: scan_arrays(path)[0], "megatron": lambda path: scan_indexed(path)[0]}
    payloads = scan[manifest.container](path)
    dtype = DTYPES[manifest.dtype]
    if int(payloads[:, 1].sum()) // dtype.itemsize == entry.tokens:
        return payloads
    trimmed = without_ends(path, payloads, dtype, manifest.eos_id)
    return trimmed if int(trimmed[:, 1].sum()) // dtype.itemsize == entry.tokens else payloads


@dataclass(frozen=True)
class FoundShards:
    """The shards of a folder that has no manifest: how their documents lie, and their type where the files say it."""

    container: Literal["tar", "npy", "megatron"]
    shards: list[tuple[Path, Payloads]]
    dtype: str | None

    def sidecar(self, path: Path) -> Path:
        """The place of a shard's sidecar. Megatron's own index has the plain name."""
        return path.with_suffix(".llmtrain.idx" if self.container == "megatron" else ".idx")


def index_folder(
    folder: Path, tokenizer: Tokenizer, dtype: str | None = None, found: FoundShards | None = None
) -> tuple[Manifest, int]:
    """Write sidecars and a manifest for a folder of shards that hold ids of this tokenizer: tars with `.bin` or `.npy`
    members, or Megatron's indexed data sets.

    `dtype` is that of the ids in `.bin` members; by default uint16 for vocabularies up to 65,536, else uint32. `found`
    are the folder's shards, where they were looked for already. Returns the number of documents, too, that bring their
    own end of sequence: it counts as the one that follows every document. Raises DataError where the folder has no
    shard, or one is damaged or holds other ids, ConfigError where `dtype` must be said, or must not.
    """
    found = found or find_shards(folder)
    if found.dtype is not None and dtype is not None:
        raise ConfigError(
            f"--dtype {dtype}: the files in {folder} say themselves that it is {found.dtype}. Leave it out."
        )
    name = found.dtype or stored_dtype(found.shards, tokenizer.vocab_size, dtype)
    entries, ended = [], 0
    for path, payloads in found.shards:
        _require_ids(path, payloads, DTYPES[name], tokenizer.vocab_size)
        documents = without_ends(path, payloads, DTYPES[name], tokenizer.eos_id)
        ended += int((documents[:, 1] != payloads[:, 1]).sum())
        entries.append(_index_shard(path, found.sidecar(path), documents, DTYPES[name]))
    bos_ids = tokenizer.around[0] if tokenizer.roles.bos_ids is None else tokenizer.roles.bos_ids
    sidecars = [(path, found.sidecar(path)) for path, _ in found.shards]
    if bos_ids and not all(_all_begin_with(*pair, bos_ids, DTYPES[name]) for pair in sidecars):
        bos_ids = ()
    beside = (place / SETTINGS_NAME for place in (folder, folder.absolute().parent))
    settings = next((file_sha256(path) for path in beside if path.is_file()), "")
    meaning = (tokenizer.sha256, tokenizer.vocab_size, name, tokenizer.eos_id)
    lossy = bool(lost_in_texts(tokenizer))
    manifest = Manifest(SCHEMA_VERSION, *meaning, tuple(entries), bos_ids, settings, lossy, found.container)
    write_manifest(folder, manifest)
    return manifest, ended


def find_shards(folder: Path) -> FoundShards:
    """The shards of a folder without a manifest. Raises DataError where it has none with ids, or of several kinds."""
    tars, indexed = sorted(folder.glob("*.tar")), megatron_files(folder)
    if tars and indexed:
        raise DataError(f"{folder}: holds tars and Megatron's files ({indexed[0].name}). Put them into folders apart.")
    if indexed:
        scanned = [(path, *scan_indexed(path)) for path in indexed]
        return FoundShards("megatron", [(path, places) for path, places, _ in scanned], _one_type(folder, scanned))
    if not tars:
        raise DataError(f"{folder}: holds no .tar file. Name a folder of tar shards, or of Megatron's .bin and .idx.")
    shards = [(path, scan_tar(path)) for path in tars]
    for path, kind in ((path, kind) for path in tars for kind in WRITTEN_BY):
        if next(iter_members(path, f".{kind}"), None) is not None:
            raise DataError(
                f"{path}: has .{kind} members, of which only {MANIFEST_NAME} says what they mean. Copy it from where "
                f"the shards come from, or write them with `{WRITTEN_BY[kind]}`."
            )
    if all(len(places) for _, places in shards):
        return FoundShards("tar", shards, None)
    empty = next(path for path, places in shards if not len(places))
    arrays = [(path, *scan_arrays(path)) for path in tars]
    if any(len(places) for _, places in shards) or not all(len(places) for _, places, _ in arrays):
        raise DataError(f"{empty}: has no {TOKEN_SUFFIX} member. {_advice(empty)}")
    return FoundShards("npy", [(path, places) for path, places, _ in arrays], _one_type(folder, arrays))


def _one_type(folder: Path, scanned: Sequence[tuple[Path, Payloads, str | None]]) -> str | None:
    types = {dtype: path for path, _, dtype in scanned}
    if len(types) > 1:
        said = " and ".join(f"{dtype} in {path.name}" for dtype, path in list(types.items())[:2])
        raise DataError(f"{folder}: ids are of several types, {said}. Index them in folders of their own.")
    return next(iter(types))


def _advice(path: Path) -> str:
    """What to do with a tar that has no ids in it."""
    text = next((suffix for suffix in (".txt", ".json") if next(iter_members(path, suffix), None)), None)
    if text is None:
        return f"Documents are members named KEY{TOKEN_SUFFIX}, or KEY{NPY_SUFFIX} in all tars of a folder."
    return (
        f"It has text ({text}), which is to be tokenized first: "
        f"`llmtrain data shards '{path.parent}/*.tar' OUT --tokenizer MODEL`."
    )


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


def _index_shard(path: Path, index_path: Path, documents: NDArray[np.uint64], dtype: np.dtype) -> ShardEntry:
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


def _all_begin_with(path: Path, index_path: Path, bos_ids: tuple[int, ...], dtype: np.dtype) -> bool:
    """True if every document of an indexed shard begins with these ids."""
    places = read_index(index_path).tolist()
    tokens, size = np.memmap(path, np.uint8, mode="r"), len(bos_ids) * dtype.itemsize
    starts = (tokens[offset : offset + min(size, length)].view(dtype) for offset, length in places)
    return all(tuple(start.tolist()) == bos_ids for start in starts)


def target_problems(folder: Path, manifest: Manifest, number: int) -> Iterator[str]:
    """One line for each document of a whole shard whose spans or labels are not what they should be."""
    if manifest.targets == "none":
        return
    shard = ShardFile(folder, manifest, number, hashed=False)
    for document in range(shard.num_documents):
        try:
            shard.targets(document)
        except DataError as error:
            yield str(error)


def token_problems(path: Path, payloads: NDArray[np.uint64], dtype: np.dtype, vocab_size: int) -> list[str]:
    """One line for each document with an id that the vocabulary does not have."""
    problems = []
    tokens = np.memmap(path, np.uint8, mode="r")
    for number, (offset, size) in enumerate(payloads[:, :2].tolist()):
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
