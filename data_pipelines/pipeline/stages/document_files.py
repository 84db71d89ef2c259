"""Files of documents between stages: lines of JSON, packed; and which of their lines later stages have removed."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice

import numpy as np
from backports import zstd
from numpy.typing import NDArray

from data_pipelines.documents import Document
from data_pipelines.pipeline.program import Kind, PipelineStage
from data_pipelines.pipeline.work import DataTask, Output, Workspace

DOCUMENTS = ".jsonl.zst"
REMOVED = ".removed"
"""Ending of the files of removals: rows (id, id of the document for whose sake), uint64, sorted."""
LEVEL = 1

ROW_BITS = 32
"""A document's id between stages is its chunk, then its row in the chunk's file."""


@dataclass(frozen=True, slots=True)
class Found:
    """A document of a file and its row there."""

    row: int
    document: Document


def row_id(chunk: int, row: int) -> int:
    """The id of a document by its place."""
    return chunk << ROW_BITS | row


@contextmanager
def written_documents(output: Output) -> Iterator[Callable[[Document], None]]:
    """A task's file of documents, open for writing."""
    with output.file(DOCUMENTS) as file, zstd.ZstdFile(file, "w", level=LEVEL) as packed:
        packed.write(b"")  # without a document, too, the file is a whole one

        def write(document: Document) -> None:
            packed.write(document_line(document))

        yield write


def document_line(document: Document) -> bytes:
    """A document as a line of JSON; what is not known of it is left out."""
    known = {key: value for key, value in asdict(document).items() if value}
    return json.dumps(known, ensure_ascii=False).encode() + b"\n"


def kept_documents(work: Workspace, segment: int, chunk: int) -> Iterator[Found]:
    """The documents of a chunk behind a segment, without those that the stages after it have removed.

    Raises DamagedWorkError.
    """
    task = DataTask(work.program.documents(segment).name, chunk)
    path = work.checked(task, DOCUMENTS)
    removed = removed_rows(work, segment, chunk)
    with zstd.ZstdFile(path) as file:
        for row, line in enumerate(file):
            if row not in removed:
                yield Found(row, Document(**json.loads(line)))


def document_at(work: Workspace, stage: str, place: int) -> Document:
    """One document by its id. Raises DamagedWorkError."""
    row = place & ((1 << ROW_BITS) - 1)
    with zstd.ZstdFile(work.checked(DataTask(stage, place >> ROW_BITS), DOCUMENTS)) as file:
        return Document(**json.loads(next(islice(file, row, None))))


def removed_rows(work: Workspace, segment: int, chunk: int, before: Kind | None = None) -> set[int]:
    """Rows of a chunk's file that are removed, by all stages or by those before another kind."""
    rows: set[int] = set()
    for stage in work.program.removals(segment, before):
        for removals in iter_removals(work, stage):
            begin, end = np.searchsorted(removals[:, 0], [row_id(chunk, 0), row_id(chunk + 1, 0)])
            rows.update((removals[begin:end, 0] & ((1 << ROW_BITS) - 1)).tolist())
    return rows


def iter_removals(work: Workspace, stage: PipelineStage) -> Iterator[NDArray[np.uint64]]:
    """The removals [n, 2] of each task of a stage. Raises DamagedWorkError."""
    for number in range(work.num_tasks(stage)):
        path = work.checked(DataTask(stage.name, number), REMOVED)
        size = path.stat().st_size
        yield np.memmap(path, np.uint64, "r", shape=(size // 16, 2)) if size else np.empty((0, 2), np.uint64)


def write_removals(output: Output, removed: NDArray[np.uint64], heads: NDArray[np.uint64]) -> None:
    """A task's file of removals: which documents go, and for the sake of which."""
    order = np.argsort(removed, kind="stable")
    with output.file(REMOVED) as file:
        file.write(np.stack([removed, heads], 1)[order].astype(np.uint64).tobytes())
