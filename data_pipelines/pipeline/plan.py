"""plan.json: what a pipeline reads and does, fixed when it is first started, so that what continues it is the same."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from data_pipelines.pipeline.chunks import FilePiece, InputChunk, SourceFile
from data_pipelines.reading.opened import FileSpan
from llmtrain.config.pipelines.schema import PipelineConfig
from llmtrain.errors import ConfigError, DataError
from llmtrain.files import read_json, replace_file, sealed, sync_folder, unsealed

PLAN_NAME = "plan.json"
SCHEMA_VERSION = 1
_PLAN_BYTES = 4 << 30
"""A plan has about a hundred bytes for each file."""

_NOT_OF_RESULT = ("run", "output_dir", "name")
"""Sections that do not change the result."""


@dataclass(frozen=True)
class Plan:
    """The inputs in chunks, and what the result follows from beside them.

    `resources` are hashes of the other files that steps read, by path; `left_out` counts inputs that are not read.
    """

    pipeline: Mapping[str, Any]
    versions: Mapping[str, str]
    resources: Mapping[str, str]
    files: tuple[SourceFile, ...]
    chunks: tuple[InputChunk, ...]
    left_out: Mapping[str, int]

    @cached_property
    def id(self) -> str:
        """Names the plan in done-records: those of another one are not believed."""
        content = self._content()
        # Whoever copies an input gives it another time, and not another content.
        content["files"] = [[*file[:3], file[4] or file[3]] for file in content["files"]]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def _content(self) -> dict[str, Any]:
        pieces = [
            [
                [piece.file, piece.bytes, *([] if piece.span is None else asdict(piece.span).values())]
                for piece in chunk.pieces
            ]
            for chunk in self.chunks
        ]
        return {
            "schema_version": SCHEMA_VERSION,
            "pipeline": self.pipeline,
            "versions": self.versions,
            "resources": self.resources,
            "files": [list(asdict(file).values()) for file in self.files],
            "chunks": [[chunk.source, held] for chunk, held in zip(self.chunks, pieces, strict=True)],
            "left_out": self.left_out,
        }

    def write(self, folder: Path) -> None:
        """Put the plan into its folder, whole or not at all."""
        replace_file(folder / PLAN_NAME, json.dumps(sealed(self._content())).encode())
        sync_folder(folder)


def read_plan(folder: Path) -> Plan | None:
    """The plan in a folder; None where there is none. Raises DataError where it is damaged."""
    path = folder / PLAN_NAME
    try:
        found = unsealed(read_json(path, _PLAN_BYTES))
        if found["schema_version"] != SCHEMA_VERSION:
            raise ValueError(f"schema_version = {found['schema_version']}, not {SCHEMA_VERSION}")
        return Plan(
            found["pipeline"],
            found["versions"],
            found["resources"],
            tuple(SourceFile(*file) for file in found["files"]),
            tuple(InputChunk(source, tuple(map(_piece, pieces))) for source, pieces in found["chunks"]),
            found["left_out"],
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path}: not a whole plan ({error}). Delete the folder to begin anew, or put the file back."
        ) from None


def _piece(values: list[int]) -> FilePiece:
    file, size, *span = values
    return FilePiece(file, size, FileSpan(*span) if span else None)


def result_settings(config: PipelineConfig) -> dict[str, Any]:
    """The settings that the result follows from, as plain values."""
    return {key: value for key, value in config.model_dump(mode="json").items() if key not in _NOT_OF_RESULT}


def installed_versions(names: Iterable[str]) -> dict[str, str]:
    """The versions of those of the packages that are installed."""
    found = {}
    for name in sorted(set(names)):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def require_same(old: Plan, new: Plan, folder: Path) -> None:
    """Raise ConfigError, with everything that differs, where a folder was begun as another pipeline."""
    differences = [
        *_differing_settings("", old.pipeline, new.pipeline),
        *_differing_settings("version of ", old.versions, new.versions),
        *_differing_settings("content of ", old.resources, new.resources),
        *_differing_files(old.files, new.files),
    ]
    if not differences:
        return
    shown = "\n".join(f"  {line}" for line in differences[:20])
    more = f"\n  and {len(differences) - 20} more" if len(differences) > 20 else ""
    raise ConfigError(
        f"{folder}: was begun as another pipeline or with other inputs. What differs:\n{shown}{more}\n"
        "Set it back, give this one another name, or delete the folder to begin anew."
    )


def _differing_settings(what: str, old: Any, new: Any, key: str = "") -> Iterable[str]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for name in [*old, *(name for name in new if name not in old)]:
            yield from _differing_settings(what, old.get(name), new.get(name), f"{key}.{name}" if key else str(name))
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for number, (before, after) in enumerate(zip(old, new, strict=True)):
            yield from _differing_settings(what, before, after, f"{key}.{number}")
    elif old != new:
        yield f"{what}{key}: was {json.dumps(old)}, is {json.dumps(new)}"


def _differing_files(old: tuple[SourceFile, ...], new: tuple[SourceFile, ...]) -> Iterable[str]:
    before = {file.location: file for file in old}
    after = {file.location: file for file in new}
    for location in before.keys() - after.keys():
        yield f"{location}: is missing"
    for location in after.keys() - before.keys():
        yield f"{location}: is new"
    for location in sorted(before.keys() & after.keys()):
        first, second = (
            f"{file.bytes} bytes, {file.sha256[:12] or file.version}" for file in (before[location], after[location])
        )
        if before[location].content != after[location].content:
            yield f"{location}: was {first}, is {second}"
    if [file.location for file in old] != [file.location for file in new] and before.keys() == after.keys():
        yield "the order of the inputs"
