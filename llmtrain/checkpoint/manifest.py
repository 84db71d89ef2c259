"""The content of a checkpoint folder as data: `manifest.json` and the names around it.

checkpoints/step-00000050/
    rank-00000.safetensors   fragments that one rank held; more of them in rank-00000-1.safetensors, ...
    config.yaml              the run's resolved configuration
    state.json               position of the run, engine state, environment
    manifest.json            every file with size and sha256, every tensor with its fragments
    manifest.json.sha256     as `sha256sum` writes it
"""

import errno
import hashlib
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError

from llmtrain.checkpoint.folders import LONGEST_MANIFEST, MANIFEST, MANIFEST_HASH, step_folder_name
from llmtrain.checkpoint.tensor_file import DTYPES
from llmtrain.errors import CheckpointError
from llmtrain.files import parse_json, read_bytes
from llmtrain.values.fragment import Box, tiling_problem
from llmtrain.words import fault_text

SCHEMA_VERSION = 1
TENSOR_FILE_SUFFIX = ".safetensors"

PLAIN_NAME = r"^[A-Za-z0-9_-][A-Za-z0-9_.-]*$"
"""A file of the folder itself: no separator, no leading dot, so no way out of the folder."""


class CheckpointUnusableError(CheckpointError):
    """A checkpoint that need not be damaged, but that this program or this user cannot read."""


def writing_folder_name(step: int) -> str:
    """The folder that all ranks write into before rank 0 renames it."""
    return f"writing-{step_folder_name(step)}"


def fragment_key(kind: str, name: str, box: Box) -> str:
    """The name of a fragment inside a tensor file."""
    return f"{kind}/{name}@{','.join(map(str, box.offsets))}"


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class FileEntry(_Entry):
    """One file of the folder."""

    size_bytes: NonNegativeInt
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class FragmentEntry(_Entry):
    """The place of one box of a tensor: `key` in `file`."""

    offsets: tuple[NonNegativeInt, ...]
    shape: tuple[NonNegativeInt, ...]
    file: str
    key: str

    @property
    def box(self) -> Box:
        return Box(self.offsets, self.shape)


class TensorEntry(_Entry):
    """One global tensor. `dtype` is safetensors' name for the type."""

    dtype: str
    global_shape: tuple[NonNegativeInt, ...]
    fragments: tuple[FragmentEntry, ...]


FileName = Annotated[str, Field(pattern=PLAIN_NAME)]


class ManifestPart(_Entry):
    """The files that one rank wrote, and by name and kind the tensors that it holds fragments of."""

    files: dict[FileName, FileEntry]
    tensors: dict[str, dict[str, TensorEntry]]


class CheckpointManifest(ManifestPart):
    """The whole checkpoint. `about` is free: the layout and the engine that it came from, its metric."""

    schema_version: int
    step: NonNegativeInt
    created_by: dict[str, str]
    about: dict[str, Any]

    def iter_fragments(self) -> Iterable[tuple[TensorEntry, FragmentEntry]]:
        for kinds in self.tensors.values():
            for tensor in kinds.values():
                for fragment in tensor.fragments:
                    yield tensor, fragment

    def problems(self) -> list[str]:
        """Contradictions: unknown types, unlisted files, tensors that are not held exactly once."""
        found = []
        for name, kinds in self.tensors.items():
            for kind, tensor in kinds.items():
                if tensor.dtype not in DTYPES:
                    found.append(f"{kind} of {name}: dtype {tensor.dtype}, allowed are {', '.join(DTYPES)}")
                if any(len(entry.offsets) != len(entry.shape) for entry in tensor.fragments):
                    found.append(f"{kind} of {name}: offsets and shape of a fragment differ in length")
                elif problem := tiling_problem(tensor.global_shape, (entry.box for entry in tensor.fragments)):
                    found.append(f"{kind} of {name}: {problem}")
        unlisted = {entry.file for _, entry in self.iter_fragments()} - set(self.files)
        return found + [f"{file} holds fragments but is not listed among the files" for file in sorted(unlisted)]


def merge_parts(parts: Iterable[ManifestPart], step: int, about: dict[str, Any]) -> CheckpointManifest:
    """One manifest from what the ranks wrote.

    Raises ValueError where two ranks disagree on a tensor or where an element is missing or held twice: a defect of
    the engine that must not be found at the next resume.
    """
    files: dict[str, FileEntry] = {}
    tensors: dict[str, dict[str, TensorEntry]] = {}
    for part in parts:
        if twice := files.keys() & part.files.keys():
            raise ValueError(f"two ranks wrote {', '.join(sorted(twice))}")
        files.update(part.files)
        for name, kinds in part.tensors.items():
            for kind, tensor in kinds.items():
                known = tensors.setdefault(name, {}).get(kind)
                if known and (known.dtype, known.global_shape) != (tensor.dtype, tensor.global_shape):
                    raise ValueError(f"ranks disagree on {kind} of {name}: {known.dtype} {known.global_shape}, "
                                     f"{tensor.dtype} {tensor.global_shape}")  # fmt: skip
                # In the order of ranks, so that the same run gives the same bytes.
                fragments = (known.fragments if known else ()) + tensor.fragments
                tensors[name][kind] = TensorEntry(
                    dtype=tensor.dtype, global_shape=tensor.global_shape, fragments=fragments
                )
    versions = {name: version(name) for name in ("llmtrain", "torch", "safetensors")}
    manifest = CheckpointManifest(
        schema_version=SCHEMA_VERSION, step=step, created_by=versions, about=about, files=files, tensors=tensors
    )
    if problems := manifest.problems():
        raise ValueError("; ".join(problems[:5]))
    return manifest


def manifest_sha256(folder: Path) -> str:
    """The hash of a checkpoint's manifest, which names the hashes of all its files. Raises as `load_manifest`."""
    return hashlib.sha256(_read(folder / MANIFEST)).hexdigest()


def manifest_hash_line(manifest: bytes) -> bytes:
    """The content of `manifest.json.sha256`, which `sha256sum --check` accepts."""
    return f"{hashlib.sha256(manifest).hexdigest()}  {MANIFEST}\n".encode()


def load_manifest(folder: Path) -> CheckpointManifest:
    """The manifest of a checkpoint folder, its hash and its form checked.

    Raises CheckpointError where it is missing or damaged, CheckpointUnusableError for a newer format.
    """
    path = folder / MANIFEST
    content, hash_line = _read(path), _read(folder / MANIFEST_HASH)
    if hash_line != manifest_hash_line(content):
        expected = hash_line.decode("ascii", "replace").split(" ")[0].strip()
        raise CheckpointError(
            f"{path}: sha256 is {hashlib.sha256(content).hexdigest()}, {MANIFEST_HASH} says {expected}"
        )
    try:
        found = parse_json(content).get("schema_version")
        if isinstance(found, int) and found > SCHEMA_VERSION:
            raise CheckpointUnusableError(
                f"{path}: schema_version = {found} is newer than what this llmtrain reads ({SCHEMA_VERSION}). "
                "Install a newer llmtrain."
            )
        return CheckpointManifest.model_validate_json(content)
    except (ValueError, AttributeError, RecursionError) as error:
        reason = fault_text(error) if isinstance(error, ValidationError) else str(error)
        raise CheckpointError(f"{path}: is not a manifest of a checkpoint: {reason}") from error


def _read(path: Path) -> bytes:
    try:
        return read_bytes(path, LONGEST_MANIFEST)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: is missing") from None
    except OSError as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, error: OSError) -> CheckpointError:
    """The error for a file that is there but gives no bytes. Missing permission is not damage."""
    kind = (
        CheckpointError
        if error.errno in (errno.EIO, errno.EISDIR, errno.EINVAL, errno.EFBIG, errno.ELOOP)
        else CheckpointUnusableError
    )
    return kind(f"{path}: cannot be read: {error.strerror}. Check its permissions and its file system.")
