"""Reading a checkpoint: checked when it is opened, then any box of any tensor in it."""

import hashlib
import os
import stat
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmtrain.checkpoint.folders import BASE, CONFIG, MANIFEST, MANIFEST_HASH, STATE, checkpoints_at, wrong_name
from llmtrain.checkpoint.manifest import (
    TENSOR_FILE_SUFFIX,
    CheckpointManifest,
    TensorEntry,
    load_manifest,
    manifest_sha256,
    unreadable,
)
from llmtrain.checkpoint.stored_tensors import Scratch, StoredTensors
from llmtrain.checkpoint.tensor_file import DTYPES
from llmtrain.errors import CheckpointError, ConfigError
from llmtrain.files import read_json, read_text
from llmtrain.values.fragment import Box

WHAT_TO_DO = (
    "Do not use it: copy it again from where it came from, or resume from an older one "
    "(`llmtrain checkpoint list RUN`)."
)
MAX_SHOWN = 10
MAX_OPEN_FILES = 64
"""A checkpoint has a file per rank that saved it, and a process may not open so many."""


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a checkpoint. `dtype` is safetensors' name for its type."""

    name: str
    kind: str
    dtype: str
    shape: tuple[int, ...]
    num_fragments: int

    @property
    def num_elements(self) -> int:
        return Box.whole(self.shape).num_elements

    @property
    def size_bytes(self) -> int:
        return self.num_elements * DTYPES[self.dtype].itemsize


class CheckpointReader:
    """A checkpoint whose form has been checked, as a source of fragments. Made by `open_checkpoint`."""

    def __init__(
        self,
        path: Path,
        manifest: CheckpointManifest,
        state: dict[str, Any],
        config_text: str,
        base: "CheckpointReader | None" = None,
    ) -> None:
        self.path = path
        self.base = base
        """The checkpoint that has its frozen weights."""
        self.state = state
        """The JSON that was handed in at the save."""
        self.config_text = config_text
        """The resolved configuration of the run that saved it, as YAML."""
        self._manifest = manifest
        self.bytes_read = 0
        """Bytes that `read` has taken from tensor files; more than it returned where parts of pages are not needed."""
        self._open_files: dict[str, StoredTensors] = {}
        self._scratch = Scratch()

    @property
    def step(self) -> int:
        return self._manifest.step

    @property
    def about(self) -> dict[str, Any]:
        """Layout and engine that it came from, and its metric."""
        return self._manifest.about

    @property
    def created_by(self) -> dict[str, str]:
        return self._manifest.created_by

    @property
    def size_bytes(self) -> int:
        return sum(entry.size_bytes for entry in self._manifest.files.values())

    @property
    def num_files(self) -> int:
        return len(self._manifest.files)

    def tensors(self) -> Iterator[TensorInfo]:
        """Every tensor in it, by name and kind."""
        for name, kinds in sorted(self._manifest.tensors.items()):
            for kind, entry in sorted(kinds.items()):
                yield TensorInfo(name, kind, entry.dtype, entry.global_shape, len(entry.fragments))

    def global_shape(self, name: str, kind: str) -> tuple[int, ...] | None:
        """Shape of the whole tensor, or None where neither the checkpoint nor its base has such a tensor."""
        entry = self._manifest.tensors.get(name, {}).get(kind)
        if entry is None:
            return self.base.global_shape(name, kind) if self.base and self._is_frozen(name) else None
        return entry.global_shape

    def _is_frozen(self, name: str) -> bool:
        """True where the base has the weight, as the checkpoint itself holds nothing of this parameter."""
        return name not in self._manifest.tensors

    @property
    def base_moved_to(self) -> Path | None:
        """Where its base lies, where that is not the place that it names."""
        if self.base is None or not isinstance(self.about.get(BASE), dict):
            return None
        return None if str(self.base.path.absolute()) == self.about[BASE]["path"] else self.base.path

    def base_of(self, frozen: Collection[str]) -> dict[str, str] | None:
        """The entry in the manifest of a checkpoint that leaves frozen parameters in this one; None without any."""
        if not frozen:
            return None
        if self.base is not None and all(map(self._is_frozen, frozen)):
            return {**self.about[BASE], "path": str(self.base.path.absolute())}
        return self.identity

    @property
    def identity(self) -> dict[str, str]:
        """This very checkpoint, as those that rest on it or learn from it name it in their manifest."""
        return {"path": str(self.path.absolute()), "manifest_sha256": manifest_sha256(self.path)}

    def read(self, name: str, kind: str, box: Box) -> Tensor:
        """The data of a box in new CPU memory, of the stored type; touches only the bytes of the box.

        Raises CheckpointError where the checkpoint has no such tensor or the box leaves its shape.
        """
        entry = self._manifest.tensors.get(name, {}).get(kind)
        if entry is None and self.base is not None and self._is_frozen(name):
            return self.base.read(name, kind, box)
        if entry is None:
            raise CheckpointError(
                f"{self.path}: has no {kind} of {name}. It was saved from another model or by an engine without it: "
                "compare the model section with `llmtrain checkpoint inspect`."
            )
        self._require_inside(name, kind, entry, box)
        result = torch.empty(box.shape, dtype=DTYPES[entry.dtype])
        copied = 0
        for fragment in entry.fragments:
            shared = box.overlap(fragment.box)
            if shared is None:
                continue
            place = shared.relative_to(fragment.box)
            self._read_stored(fragment.file, fragment.key, place, result[shared.slices_in(box)])
            copied += shared.num_elements
        assert copied == box.num_elements, "fragments tile the tensor: that was checked at opening"
        return result

    def _require_inside(self, name: str, kind: str, entry: TensorEntry, box: Box) -> None:
        shape = entry.global_shape
        same_rank = len(box.offsets) == len(box.shape) == len(shape)
        if not same_rank or any(
            offset < 0 or end > size for offset, end, size in zip(box.offsets, box.ends, shape, strict=True)
        ):
            raise CheckpointError(
                f"{self.path}: {kind} of {name} has the shape {list(shape)}; the model wants the box at "
                f"{list(box.offsets)} of shape {list(box.shape)}. The model section differs from the saved config.yaml."
            )

    def _read_stored(self, name: str, key: str, box: Box, target: Tensor) -> None:
        try:
            if name not in self._open_files:
                # The one that was opened first goes: to open it again costs a header.
                if len(self._open_files) == MAX_OPEN_FILES:
                    self._open_files.pop(next(iter(self._open_files)))
                self._open_files[name] = StoredTensors(self.path / name, self._scratch)
            self.bytes_read += self._open_files[name].read(key, box, target)
        except OSError as error:
            raise unreadable(self.path / name, error) from error


def open_checkpoint(path: Path, verify: bool = True, moved_base: Path | None = None) -> CheckpointReader:
    """Check a checkpoint folder and open it.

    Manifest, file names, sizes, tensor headers and the hashes of the small files are always checked; `verify` also
    hashes the tensor files, which one rank of a job does once. Where the checkpoint that has its frozen weights is not
    where it was, the very same one is looked for at `moved_base`, a checkpoint or a run. Raises CheckpointError with
    every problem, CheckpointUnusableError for a newer format or missing permission, ConfigError where the path does not
    exist.
    """
    path = Path(path)
    if not path.is_dir():
        raise ConfigError(f"{path}: is not a folder. Give a checkpoint such as RUN/checkpoints/step-00000050.")
    manifest = load_manifest(path)
    if problems := checkpoint_problems(path, manifest, verify):
        more = [f"... and {len(problems) - MAX_SHOWN} more"] if len(problems) > MAX_SHOWN else []
        shown = "\n  ".join(problems[:MAX_SHOWN] + more)
        raise CheckpointError(f"{path}: the checkpoint is damaged:\n  {shown}\n{WHAT_TO_DO}")
    try:
        state = read_json(path / STATE)
        config_text = read_text(path / CONFIG)
        if not isinstance(state, dict):
            raise ValueError(f"{STATE} is no JSON object")
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path}: {STATE} or {CONFIG} cannot be decoded: {error}. {WHAT_TO_DO}") from error
    return CheckpointReader(path, manifest, state, config_text, _open_base(path, manifest.about, verify, moved_base))


def _open_base(path: Path, about: Mapping[str, Any], verify: bool, moved: Path | None) -> CheckpointReader | None:
    """The checkpoint that has the frozen weights of the one at `path`, once it is known to be the very same."""
    if BASE not in about:
        return None
    try:
        place, sha256 = Path(about[BASE]["path"]), str(about[BASE]["manifest_sha256"])
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{path / MANIFEST}: about.{BASE} names no checkpoint: {about[BASE]!r}") from error
    if not place.is_dir() and moved is not None:
        place = next((found for found in checkpoints_at(moved) if manifest_sha256(found) == sha256), place)
    advice = (
        f"{path} has its frozen weights there. Put that checkpoint back, as it was when the run began; where it lies "
        "elsewhere by now, name that place as finetune.base and train on, or with --base."
    )
    if not place.is_dir():
        raise CheckpointError(f"{place}: no such checkpoint. {advice}")
    if manifest_sha256(place) != sha256:
        raise CheckpointError(f"{place / MANIFEST}: its sha256 is not {sha256}: it is another checkpoint. {advice}")
    return open_checkpoint(place, verify)


def checkpoint_problems(folder: Path, manifest: CheckpointManifest, verify: bool) -> list[str]:
    """Every difference between a folder and its manifest, each naming the file, what is expected and what is there."""
    problems = [f"{folder / MANIFEST}: {problem}" for problem in manifest.problems()]
    if fault := wrong_name(folder, manifest.step):
        problems.append(fault)
    problems += [
        f"{folder / name}: the manifest does not list it: every checkpoint has one"
        for name in (STATE, CONFIG)
        if name not in manifest.files
    ]
    try:
        present = {entry.name: entry.stat(follow_symlinks=False) for entry in os.scandir(folder)}
    except OSError as error:
        raise unreadable(folder, error) from error
    allowed = {*manifest.files, MANIFEST, MANIFEST_HASH}
    problems += [
        f"{folder / name}: is not listed in {MANIFEST}: nothing else may lie in a checkpoint. Move it away."
        for name in sorted(present.keys() - allowed)
    ]
    sound = []
    for name, entry in sorted(manifest.files.items()):
        if name not in present:
            problems.append(f"{folder / name}: is missing; the manifest lists {entry.size_bytes:,} bytes")
        elif not stat.S_ISREG(present[name].st_mode):
            problems.append(f"{folder / name}: is not a plain file")
        elif present[name].st_size != entry.size_bytes:
            problems.append(
                f"{folder / name}: has {present[name].st_size:,} bytes, the manifest says {entry.size_bytes:,}"
            )
        else:
            sound.append(name)
    problems += _hash_problems(folder, manifest, sound, verify)
    # Headers of damaged files would only say the same again.
    return problems or _header_problems(folder, manifest)


def _hash_problems(folder: Path, manifest: CheckpointManifest, names: list[str], verify: bool) -> list[str]:
    hashed = [name for name in names if verify or not name.endswith(TENSOR_FILE_SUFFIX)]

    def problem(name: str) -> str | None:
        path, expected = folder / name, manifest.files[name].sha256
        try:
            with path.open("rb") as file:
                actual = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise unreadable(path, error) from error
        return None if actual == expected else f"{path}: sha256 is {actual}, the manifest says {expected}"

    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as threads:
        return [found for found in threads.map(problem, hashed) if found]


def _header_problems(folder: Path, manifest: CheckpointManifest) -> list[str]:
    """Differences between the tensor files' own headers and the manifest; reads headers only."""
    listed: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {
        name: {} for name in manifest.files if name.endswith(TENSOR_FILE_SUFFIX)
    }
    problems = []
    for tensor, fragment in manifest.iter_fragments():
        if fragment.file not in listed:
            problems.append(f"{folder / fragment.file}: holds fragments but is no {TENSOR_FILE_SUFFIX} file")
        elif fragment.key in listed[fragment.file]:
            problems.append(f"{folder / fragment.file}: the manifest lists {fragment.key} twice")
        else:
            listed[fragment.file][fragment.key] = (tensor.dtype, fragment.shape)
    for name, expected in listed.items():
        try:
            stored = StoredTensors(folder / name, Scratch()).tensors
        except (ValueError, RecursionError) as error:
            problems.append(f"{folder / name}: is not a valid safetensors file: {error}")
            continue
        except OSError as error:
            raise unreadable(folder / name, error) from error
        actual = {key: (tensor.dtype, tensor.shape) for key, tensor in stored.items()}
        for key in sorted(expected.keys() | actual.keys()):
            if expected.get(key) != actual.get(key):
                problems.append(
                    f"{folder / name}: {key} is {actual.get(key, 'absent')} in the file, "
                    f"{expected.get(key, 'absent')} in the manifest"
                )
    return problems
