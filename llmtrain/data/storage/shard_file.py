"""One shard opened for reading, and where in a damaged one the damage lies. Imports no torch."""

import tarfile
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmtrain.data.storage.manifest import DTYPES, DamagedFileError, Manifest, ShardEntry, check_file, read_index
from llmtrain.data.storage.targets import TARGET_DTYPES, labels_fault, trained_fault
from llmtrain.errors import DataError
from llmtrain.files import open_regular

TAR_BLOCK_BYTES = 512
_CHECKSUM = slice(148, 156)
"""The place of the checksum in a tar header; it counts its own bytes as spaces."""


@dataclass(frozen=True)
class ShardPaths:
    """The paths of a shard and its sidecar."""

    tar: Path
    index: Path


class ShardFile:
    """One shard opened for reading: the tar mapped into memory, and the place of each document in its stream."""

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        number: int,
        hashed: bool = True,
        paths: ShardPaths | None = None,
        held: object = None,
    ) -> None:
        """Open shard `number`, comparing sizes with the manifest, and hashes where `hashed`.

        `paths` is given where the files are kept under other names than the manifest's, `held` is kept as long as the
        shard is open. Raises DamagedFileError.
        """
        self._held = held
        entry = manifest.shards[number]
        paths = paths or ShardPaths(folder / entry.file, folder / entry.index_file)
        dtype = DTYPES[manifest.dtype]
        check_file(paths.tar)  # a shard that is gone is named before its sidecar
        check_file(paths.index, None, entry.index_sha256 if hashed else None)
        payloads = read_index(paths.index).astype(np.int64)
        self._is_tar = manifest.container != "megatron"
        _check_index(paths.index, payloads, entry, Grid.of(manifest))
        _check_shard(paths.tar, payloads.reshape(-1, 2), entry, hashed, manifest)
        self.path = paths.tar
        self.lengths = payloads[:, 1] // dtype.itemsize
        self._eos_id = manifest.eos_id
        self._vocab_size = manifest.vocab_size
        # Payloads lie at multiples of an id's bytes: the file is one array of tokens, headers included.
        # A file of zero bytes cannot be mapped.
        mapped = np.memmap(paths.tar, np.uint8, mode="r") if entry.bytes else np.empty(0, np.uint8)
        self._tokens = np.asarray(mapped)[: entry.bytes // dtype.itemsize * dtype.itemsize].view(dtype)
        self._first = payloads[:, 0] // dtype.itemsize
        self._bytes = np.asarray(mapped)
        self._targets = payloads[:, 2:]
        self._manifest = manifest
        self._starts = np.concatenate(([0], np.cumsum(self.lengths + 1)))
        self._end = int(self._starts[-1])

    @property
    def num_documents(self) -> int:
        return len(self.lengths)

    def document(self, number: int) -> NDArray[Any]:
        """The stored token ids of one document, without the end of sequence; a view of the mapped file."""
        first = int(self._first[number])
        return self._tokens[first : first + int(self.lengths[number])]

    def read_into(self, tokens: NDArray[np.int64], begin: int) -> NDArray[np.int64]:
        """Fill `tokens`, which has room for one at least, with those of the stream from token `begin` on; returns the
        positions in it where documents begin.

        A document without tokens begins at its own end of sequence. Raises IndexError past the stream's end, and
        DataError for an id that the vocabulary does not have: the file was spoiled, and no hash has told.
        """
        length = len(tokens)
        end = begin + length
        if not 0 <= begin < end <= self._end:
            raise IndexError(f"tokens {begin} to {end}: the shard's stream has {self._end} tokens")
        first, last = self._starts.searchsorted((begin + 1, end)).tolist()
        first -= 1  # the document, or its end of sequence, that the first token belongs to
        bounds = self._starts[first : last + 1] - begin
        starts = bounds[:-1]
        sources = (self._first[first:last] - starts).tolist()  # where position 0 would lie in the file
        stored = np.empty(
            length, self._tokens.dtype
        )  # as narrow as the file: copied, looked through and widened faster
        for source, (start, next_start) in zip(sources, pairwise(bounds.tolist()), strict=True):
            low, high = max(start, 0), min(next_start - 1, length)
            stored[low:high] = self._tokens[source + low : source + high]
            if high < length:
                stored[high] = self._eos_id
        if stored.max() >= self._vocab_size:
            self._raise_unknown_id(stored, first, begin)
        tokens[:] = stored
        return starts if bounds[0] == 0 else starts[1:]

    def read_pieces(self, tokens: NDArray[np.int64], begins: list[int], ends: list[int]) -> list[int]:
        """Fill `tokens` from its begin with tokens [begin, end) of the stream, one piece behind the other, each of one
        document; returns the position of each piece and the end of the last. Raises as `read_into` does."""
        documents = self._starts.searchsorted(begins, side="right") - 1
        sources = (self._first[documents] - self._starts[documents]).tolist()  # where the stream's begin would lie
        lasts = (self._starts[documents + 1] - 1).tolist()  # the ends of sequence
        places, filled, stored = [0], 0, np.empty(len(tokens), self._tokens.dtype)
        for begin, end, source, last in zip(begins, ends, sources, lasts, strict=True):
            stop, place = min(end, last), filled
            filled += end - begin
            stored[place : place + stop - begin] = self._tokens[source + begin : source + stop]
            if end > last:
                stored[filled - 1] = self._eos_id
            places.append(filled)
        if stored[:filled].max() >= self._vocab_size:
            for begin, end in zip(begins, ends, strict=True):
                self.read_into(np.empty(end - begin, np.int64), begin)  # one of them says where
        tokens[:filled] = stored[:filled]
        return places

    def targets(self, number: int) -> NDArray[np.int64]:
        """The second member of a document: spans [n, 2] of its trained tokens, or its labels [n].

        Raises DataError where it is not what it should be: the file was spoiled, and no hash has told.
        """
        kind, record = self._manifest.targets, self._manifest.labels
        offset, size = self._targets[number].tolist()
        stored = self._bytes[offset : offset + size].view(TARGET_DTYPES[kind]).astype(np.int64)
        found = stored.reshape(-1, 2) if kind == "trained" else stored
        length = int(self.lengths[number])
        fault = trained_fault(found, length) if record is None else labels_fault(found, length, record)
        if fault is not None:
            raise DataError(
                f"{self.path}: document {number} ({self.key(number)}.{kind}): {fault}. Copy the file again; "
                "`llmtrain data verify` finds all of them."
            )
        return found

    def targets_of_pieces(self, begins: list[int], places: list[int]) -> NDArray[np.int64]:
        """The second members of documents that begin at `begins` in the stream and at `places` in a sample: spans
        [n, 2] of its positions, which may reach behind a document that is cut; or the labels of the first."""
        documents = (self._starts.searchsorted(begins, side="right") - 1).tolist()
        if self._manifest.targets == "labels":
            return self.targets(documents[0])
        pairs = zip(documents, places, strict=True)
        return np.concatenate([self.targets(document) + place for document, place in pairs])

    def documents_between(self, begin: int, end: int) -> list[tuple[int, int, int]]:
        """The documents that tokens [begin, end) of the stream belong to: each one's number, and the bounds of the
        tokens in it, where its end of sequence counts as its last."""
        first, last = self._starts.searchsorted((begin + 1, end)).tolist()
        found = []
        for number in range(first - 1, last):
            start = int(self._starts[number])
            bounds = max(begin, start) - start, min(end, int(self._starts[number + 1])) - start
            found.append((number, *bounds))
        return found

    def key(self, document: int) -> str:
        """The name of a document's member in the tar, without what follows its first dot, as WebDataset has it; its
        number in files that have no names."""
        if not self._is_tar:
            return str(document)
        # A member begins with a block; what an array says of itself before its ids is shorter than that.
        member = int(self._first[document]) * self._tokens.itemsize // TAR_BLOCK_BYTES * TAR_BLOCK_BYTES
        header = self._tokens.view(np.uint8)[member - TAR_BLOCK_BYTES : member].tobytes()
        try:
            folder, _, name = tarfile.TarInfo.frombuf(header, "utf-8", "replace").name.rpartition("/")
        except tarfile.HeaderError:
            return str(document)  # the file is no longer what it was when it was opened
        return f"{folder}/{name.partition('.')[0]}".lstrip("/")

    def _raise_unknown_id(self, tokens: NDArray[Any], first: int, begin: int) -> None:
        """Name the first id that is none, and its byte; `first` is the document that the tokens begin in."""
        at = int(np.argmax(tokens >= self._vocab_size))
        document = first + int(np.searchsorted(self._starts[first:], begin + at, side="right")) - 1
        token = int(self._first[document]) + begin + at - int(self._starts[document])
        raise DataError(
            f"{self.path}: document {document}, byte {token * self._tokens.itemsize}: expected an id "
            f"below {self._vocab_size}, actual {tokens[at]}. Copy the file again; data.verify=first finds this before "
            "any sample is used."
        )


@dataclass(frozen=True)
class Grid:
    """Where members can lie in a shard: at multiples of `step` bytes, with `gap` bytes at least before each, counted
    from the end of the one before, rounded up to `block`. `itemsizes` are what sizes of a document's members are
    multiples of, ids first."""

    itemsizes: tuple[int, ...]
    step: int
    gap: int
    block: int

    @staticmethod
    def of(manifest: Manifest) -> "Grid":
        """A tar's document has its header before it, and nothing else's: an archive is made of blocks."""
        itemsize = DTYPES[manifest.dtype].itemsize
        if manifest.container == "megatron":
            return Grid((itemsize,), itemsize, 0, itemsize)
        step = TAR_BLOCK_BYTES if manifest.container == "tar" else itemsize
        second = {"none": (), "trained": (8,), "labels": (4,)}[manifest.targets]
        return Grid((itemsize, *second), step, TAR_BLOCK_BYTES, TAR_BLOCK_BYTES)


def _check_index(path: Path, payloads: NDArray[np.int64], entry: ShardEntry, grid: Grid) -> None:
    """Raises DamagedFileError where a sidecar contradicts the manifest, whatever its hash."""
    itemsize = grid.itemsizes[0]
    sizes = payloads[:, 1]
    if payloads.shape[1] != 2 * len(grid.itemsizes):
        found = f"{payloads.shape[1] // 2} members of a document"
        message = f"{path}: expected {len(grid.itemsizes)} of each, actual {found}. Delete it; "
        message += f"`llmtrain data index {path.parent}` rebuilds it."
        raise DamagedFileError(message, "index", f"{found} in {path.name}")
    found = len(payloads), int((sizes // itemsize).sum())
    if found != (entry.samples, entry.tokens):
        raise DamagedFileError(
            f"{path}: expected {entry.samples} documents with {entry.tokens} tokens, actual {found[0]} with "
            f"{found[1]}. Delete it; `llmtrain data index {path.parent}` rebuilds it.",
            "index",
            f"{found[0]} documents with {found[1]} tokens in {path.name}",
        )
    offsets, sizes = payloads.reshape(-1, 2).T  # of all members, as they stand in the file
    ends = np.concatenate(([0], -(-(offsets + sizes) // grid.block) * grid.block))
    apart = not (offsets % grid.step).any() and bool((offsets - ends[:-1] >= grid.gap).all())
    whole = not any((payloads[:, 2 * i + 1] % size).any() for i, size in enumerate(grid.itemsizes))
    if not apart or not whole or (payloads < 0).any() or (offsets + sizes > entry.bytes).any():
        raise DamagedFileError(
            f"{path}: places lie outside of the {entry.bytes} bytes of {entry.file} or where no document can be. "
            f"Delete it; `llmtrain data index {path.parent}` rebuilds it.",
            "index",
            f"places outside of {entry.file} in {path.name}",
        )


def _check_shard(path: Path, payloads: NDArray[np.int64], entry: ShardEntry, hashed: bool, manifest: Manifest) -> None:
    """Compare a shard with the manifest; the error of `check_file` also tells where the damage lies."""
    members = 1 if manifest.targets == "none" else 2
    try:
        check_file(path, entry.bytes, entry.sha256 if hashed else None)
    except DamagedFileError as damage:
        if damage.reason == "missing":
            raise
        size_bytes = path.stat().st_size
        if damage.reason == "sha256":
            place = place_of_flip(path, payloads, members) if manifest.container == "tar" else "somewhere in it"
        elif size_bytes < entry.bytes:
            place = f"cut short: {place_of_cut(payloads, size_bytes, members)}"
        else:
            place = f"{size_bytes - entry.bytes} bytes too many, from byte {entry.bytes} on"
        raise DamagedFileError(f"{damage} ({place})", damage.reason, damage.actual) from None


def place_of_cut(payloads: NDArray[np.int64], size_bytes: int, members: int = 1) -> str:
    """The part of a whole shard that has byte `size_bytes`, by [payloads, 2] offsets and sizes, `members` each."""
    ends = payloads[:, 0] + payloads[:, 1]
    number = int(np.searchsorted(ends, size_bytes, side="right"))  # the first document that is not there whole
    if number == len(payloads):
        return f"byte {size_bytes} lies behind the last document"
    begin, end, number = int(payloads[number, 0]), int(ends[number]), number // members
    if size_bytes > begin:
        return f"byte {size_bytes} lies inside document {number} (bytes {begin} to {end})"
    if size_bytes > begin - TAR_BLOCK_BYTES:
        return f"byte {size_bytes} lies inside the header of document {number}"
    return f"byte {size_bytes} lies before the header of document {number}"


def place_of_flip(path: Path, payloads: NDArray[np.int64], members: int = 1) -> str:
    """The first header of a shard whose own checksum is wrong, or that none is."""
    with open_regular(path) as file:
        for number, (offset, size) in enumerate(payloads.tolist()):
            begin = offset - TAR_BLOCK_BYTES
            file.seek(max(0, begin))
            header = file.read(TAR_BLOCK_BYTES)
            if begin < 0 or not _is_header(header, size):
                return f"the header of document {number // members} at byte {begin} is damaged"
    return "every header is whole, so the damage lies in the documents or between them"


def _is_header(block: bytes, size: int) -> bool:
    """True for a tar header with a right checksum, of a member with so many bytes."""
    written = block[_CHECKSUM].strip(b" \0")
    total = sum(block) - sum(block[_CHECKSUM]) + 8 * ord(" ")
    try:
        member_size = int(block[124:136].strip(b" \0"), 8)
        # A document may stop one id before its member does: before an end of sequence of its own.
        return int(written, 8) == total and member_size in (size, size + 2, size + 4)
    except ValueError:  # no octal numbers; sizes from 8 GiB on are written otherwise, and no document has them
        return False
