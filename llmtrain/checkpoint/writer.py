"""Writing a checkpoint: a copy of the state, each rank its fragments, then the rename that makes it visible."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmtrain.checkpoint.folders import (
    CONFIG,
    MANIFEST,
    MANIFEST_HASH,
    STATE,
    free_bytes,
    save_error,
    step_folder_name,
)
from llmtrain.checkpoint.manifest import (
    TENSOR_FILE_SUFFIX,
    FileEntry,
    FragmentEntry,
    ManifestPart,
    TensorEntry,
    fragment_key,
    manifest_hash_line,
    merge_parts,
    writing_folder_name,
)
from llmtrain.checkpoint.tensor_file import DTYPE_NAMES, write_all, write_tensor_file
from llmtrain.errors import CheckpointError
from llmtrain.files import replace_folder, sync_folder
from llmtrain.values.fragment import Fragment


class HostCopy:
    """CPU memory for a copy of the state. It is kept between saves: new memory costs more than the copy itself."""

    def __init__(self) -> None:
        self._memory: dict[tuple[object, ...], Tensor] = {}

    def take(self, fragments: Iterable[Fragment]) -> list[Fragment]:
        """The fragments with their data as it is now. They are valid until the next call."""
        copies = []
        on_device = False
        for fragment in fragments:
            source = fragment.tensor.detach()
            key = (fragment.kind, fragment.name, fragment.box)
            target = self._memory.get(key)
            if target is None or target.dtype != source.dtype or target.shape != source.shape:
                target = self._memory[key] = torch.empty(source.shape, dtype=source.dtype, pin_memory=source.is_cuda)
            # Pinned memory takes copies of all tensors in one queue, with one wait at the end.
            target.copy_(source, non_blocking=source.is_cuda)
            on_device |= source.is_cuda
            copies.append(replace(fragment, tensor=target))
        if on_device:
            torch.cuda.synchronize()  # the copies must be whole before training writes into their sources again
        return copies


MAX_FILES = 4
"""Files that a rank writes at once, if it has the cores to hash them."""

SMALL_FILE_BYTES = 64 << 20
"""A rank that holds less than twice this writes one file."""


@dataclass(frozen=True)
class Contents:
    """The parts of a checkpoint beside tensors. `state` and `about` are JSON, `config_text` the resolved YAML."""

    step: int
    state: dict[str, Any]
    config_text: str
    about: dict[str, Any]


def start_checkpoint(checkpoints: Path, step: int, needed: int = 0) -> Path:
    """An empty folder to write step `step` into. Its name is the same on all ranks; one of them calls this.

    What earlier saves have left is removed. `needed` is the size of the whole checkpoint in bytes, where that is known.
    Raises SaveError where it does not fit or the folder cannot be made.
    """
    folder = checkpoints / writing_folder_name(step)
    try:
        # What cannot be removed does not matter, unless it is this very folder.
        with suppress(OSError):
            _clear(checkpoints)
        free = free_bytes(checkpoints)
        if free is not None and free < needed:  # to be told now is better than after minutes
            raise save_error(checkpoints, needed, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        folder.mkdir(parents=True)
    except OSError as error:
        raise save_error(folder, needed, error) from error
    return folder


def write_rank_files(folder: Path, rank: int, fragments: Iterable[Fragment]) -> ManifestPart:
    """Write what this rank holds and return its part of the manifest, once the data is on the disk.

    The tensors must not change meanwhile. Raises SaveError with the path and the needed and free bytes where the file
    system does not take them; the caller removes the folder.
    """
    held = list(fragments)
    keys = {fragment_key(item.kind, item.name, item.box) for item in held}
    assert len(keys) == len(held), "an engine gave the same fragment twice"
    shares = _equal_shares(held)
    names = [f"rank-{rank:05d}{f'-{number}' if number else ''}{TENSOR_FILE_SUFFIX}" for number in range(len(shares))]

    def write(name: str, share: Sequence[Fragment]) -> FileEntry:
        tensors = {fragment_key(item.kind, item.name, item.box): item.tensor for item in share}
        shapes = {fragment_key(item.kind, item.name, item.box): item.global_shape for item in share}
        metadata = {"format": "pt", "llmtrain.rank": str(rank), "llmtrain.global_shapes": json.dumps(shapes)}
        try:
            written = write_tensor_file(folder / name, tensors, metadata)
            return FileEntry(size_bytes=written.size_bytes, sha256=written.sha256)
        except OSError as error:
            raise save_error(folder / name, size_bytes(held), error) from error

    # A hash takes longer than the disk: several files are written at once, the first of them by this thread.
    with ThreadPoolExecutor(MAX_FILES, thread_name_prefix="checkpoint-file") as threads:
        others = threads.map(write, names[1:], shares[1:])
        files = dict(zip(names, [write(names[0], shares[0]), *others], strict=True))
    return ManifestPart(files=files, tensors=_tensor_entries(dict(zip(names, shares, strict=True))))


def _equal_shares(held: Sequence[Fragment]) -> list[list[Fragment]]:
    """The fragments in as many lists as are written at once, of about the same number of bytes."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = max(1, min(MAX_FILES, cores, size_bytes(held) // SMALL_FILE_BYTES))
    shares: list[list[Fragment]] = [[] for _ in range(count)]
    sizes = [0] * count
    for item in held:
        smallest = sizes.index(min(sizes))
        shares[smallest].append(item)
        sizes[smallest] += item.tensor.nbytes
    return shares


def size_bytes(fragments: Iterable[Fragment]) -> int:
    """Bytes of the fragments' data."""
    return sum(item.tensor.nbytes for item in fragments)


def publish(
    folder: Path, parts: Sequence[ManifestPart], contents: Contents, before_publish: Callable[[], object]
) -> Path:
    """Complete a folder of `start_checkpoint` and make it visible as `step-...` beside it; returns the new path.

    `before_publish` runs when everything is on the disk and before the rename, so what it writes is there before
    the checkpoint is. A checkpoint of the same step is replaced: what training computes now is what counts. The old
    one is renamed away first and `recover` brings it back if the process dies before the second rename.

    Raises SaveError where the file system does not take it, ValueError where the parts do not make whole tensors. The
    caller removes the folder then.
    """
    try:
        files = {
            CONFIG: _write_small(folder / CONFIG, contents.config_text.encode()),
            STATE: _write_small(folder / STATE, (json.dumps(contents.state, indent=1) + "\n").encode()),
        }
        small = ManifestPart(files=files, tensors={})
        manifest = (
            merge_parts([*parts, small], contents.step, contents.about).model_dump_json(indent=1).encode() + b"\n"
        )
        _write_small(folder / MANIFEST, manifest)
        _write_small(folder / MANIFEST_HASH, manifest_hash_line(manifest))
        # The files' names are on the disk before the rename shows them: a crash must not leave a part of a checkpoint.
        sync_folder(folder)
        before_publish()
        return _put_in_place(folder, folder.parent / step_folder_name(contents.step))
    except OSError as error:
        needed = sum(entry.size_bytes for part in parts for entry in part.files.values())
        raise save_error(folder, needed, error) from error


def remove_checkpoint(folder: Path) -> None:
    """Delete a checkpoint so that no moment shows a part of it under its own name. Raises OSError."""
    doomed = free_name(folder.parent, f"removing-{folder.name}")
    folder.rename(doomed)  # at once, where removing file by file would leave a damaged checkpoint if it is killed
    shutil.rmtree(doomed)


def recover(checkpoints: Path) -> None:
    """Undo what a killed writer left half done. Only for the process that holds the run folder's lock.

    Temporary folders are removed; a checkpoint that was renamed away for a replacement that never came is put back.
    Raises CheckpointError where the file system does not allow it.
    """
    try:
        _clear(checkpoints)
    except OSError as error:
        raise CheckpointError(
            f"{error.filename or checkpoints}: what an interrupted save left cannot be cleared: {error.strerror}. "
            "Make the folder writable."
        ) from error


def _clear(checkpoints: Path) -> None:
    for folder in sorted(checkpoints.iterdir()) if checkpoints.exists() else ():
        original = checkpoints / folder.name.removeprefix("replaced-")
        if folder.name.startswith("replaced-step-") and not original.exists():
            folder.rename(original)
        elif folder.name.startswith(("replaced-step-", "writing-step-", "removing-")):
            shutil.rmtree(folder)


def free_name(parent: Path, name: str) -> Path:
    """`name` in `parent`, with a number behind it where that exists already."""
    path, count = parent / name, 1
    while path.exists():
        count += 1
        path = parent / f"{name}.{count}"
    return path


def _put_in_place(folder: Path, target: Path) -> Path:
    replaced = target.with_name(f"replaced-{target.name}")
    # A copy that an earlier replacement left: the one in place is whole, so it is not needed.
    if target.exists() and replaced.exists():
        remove_checkpoint(replaced)
    replace_folder(folder, target, replaced)
    if replaced.exists():
        # The new checkpoint is there; what cannot be removed now is removed at the next start.
        with suppress(OSError):
            remove_checkpoint(replaced)
    return target


def _write_small(path: Path, content: bytes) -> FileEntry:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        write_all(descriptor, memoryview(content))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return FileEntry(size_bytes=len(content), sha256=hashlib.sha256(content).hexdigest())


def _tensor_entries(files: Mapping[str, Sequence[Fragment]]) -> dict[str, dict[str, TensorEntry]]:
    entries: dict[str, dict[str, TensorEntry]] = {}
    for file, item in ((file, item) for file, held in files.items() for item in held):
        assert tuple(item.tensor.shape) == item.box.shape, f"a wrong fragment of {item.name}"
        key = fragment_key(item.kind, item.name, item.box)
        entry = FragmentEntry(offsets=item.box.offsets, shape=item.box.shape, file=file, key=key)
        kinds = entries.setdefault(item.name, {})
        before = kinds[item.kind].fragments if item.kind in kinds else ()
        kinds[item.kind] = TensorEntry(
            dtype=DTYPE_NAMES[item.tensor.dtype], global_shape=item.global_shape, fragments=(*before, entry)
        )
    return entries
