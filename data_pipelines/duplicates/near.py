"""Documents that are nearly the same: candidates share a band, and are compared by their whole signatures.

Without that comparison most of what shares a band is not near: documents of one kind have whole paragraphs in common.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipelines.duplicates.signatures import BANDS, NUM_HASHES, SIGNATURES, num_bands
from data_pipelines.pipeline.stages.document_files import ROW_BITS, removed_rows, row_id, write_removals
from data_pipelines.pipeline.work import DataTask, Output, Workspace
from llmtrain.config.pipelines.steps import NearDedupStep

EDGES = ".edges"
"""Ending: pairs [n, 2] of near documents, the earlier first, uint64."""

DOCUMENTS_OF_A_PART = 16_000_000
"""A task over a band holds about 40 bytes for each of its documents."""

MOST_HEADS = 16
"""Documents that the others of a band are compared with, one after the other, while they are near none before."""

CHAIN = 0.2
"""How far below the threshold a document of a cluster may be to the one that stays. A copy of a document that is itself
removed for a third one has to go with it: of distances 1 - J two add up at most, and estimates have their error."""

_PAIRS = 100_000
"""Pairs that are compared at a time: twice 256 bytes for each."""


def num_parts(documents: int) -> int:
    """The tasks for one band of so many documents."""
    return max(1, -(-documents // DOCUMENTS_OF_A_PART))


def num_band_tasks(config: NearDedupStep, documents: int) -> int:
    """The tasks of the stage over bands."""
    return num_bands(config.threshold) * num_parts(documents)


def _config(work: Workspace, segment: int) -> NearDedupStep:
    config = work.program.segments[segment].near
    assert config is not None, segment
    return config


@dataclass(frozen=True)
class SignatureFiles:
    """The signatures of all chunks, and how many equal minima make two documents near."""

    work: Workspace
    documents: str
    least_equal: int

    @classmethod
    def of(cls, work: Workspace, segment: int, below: float = 0.0) -> "SignatureFiles":
        """Those behind a segment; `below`: how far below the step's threshold documents still count as near."""
        least = int(np.ceil((_config(work, segment).threshold - below) * NUM_HASHES))
        return cls(work, work.program.documents(segment).name, least)

    def near(self, first: NDArray[np.uint64], second: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Which pairs [n] of ids are near."""
        result = np.zeros(len(first), bool)
        for begin in range(0, len(first), _PAIRS):
            part = slice(begin, begin + _PAIRS)
            equal = (self._rows(first[part]) == self._rows(second[part])).sum(1)
            result[part] = equal >= self.least_equal
        return result

    def _rows(self, ids: NDArray[np.uint64]) -> NDArray[np.uint16]:
        """The signatures [n, NUM_HASHES] of documents, read chunk by chunk."""
        rows = np.empty((len(ids), NUM_HASHES), np.uint16)
        order = np.argsort(ids)
        chunks = (ids[order] >> np.uint64(ROW_BITS)).astype(np.int64)
        for places in np.split(order, np.flatnonzero(np.diff(chunks)) + 1) if len(ids) else ():
            path = self.work.checked(DataTask(self.documents, int(ids[places[0]]) >> ROW_BITS), SIGNATURES)
            stored = np.memmap(path, np.uint16, "r").reshape(-1, NUM_HASHES)
            rows[places] = stored[(ids[places] & np.uint64((1 << ROW_BITS) - 1)).astype(np.int64)]
        return rows


def grouped_by_heads(
    groups: NDArray[Any], ids: NDArray[np.uint64], files: SignatureFiles, most_heads: int | None
) -> tuple[NDArray[np.uint64], NDArray[np.uint64], int]:
    """Near documents within groups: which [n], to which heads [n], and how many were compared with too few.

    `groups` and `ids` are sorted by group, then id. The first of each group is its head; what is near it belongs to it;
    the first of those that do not is the next head, until none is left.
    """
    found: list[NDArray[np.uint64]] = [np.empty(0, np.uint64)]
    heads: list[NDArray[np.uint64]] = [np.empty(0, np.uint64)]
    rounds = 0
    while len(ids) and (most_heads is None or rounds < most_heads):
        rounds += 1
        begins = np.ones(len(ids), bool)
        begins[1:] = groups[1:] != groups[:-1]
        head = ids[np.maximum.accumulate(np.where(begins, np.arange(len(ids)), 0))]
        others = np.flatnonzero(~begins)
        near = files.near(head[others], ids[others])
        found.append(ids[others[near]])
        heads.append(head[others[near]])
        left = others[~near]
        groups, ids = groups[left], ids[left]
    return np.concatenate(found), np.concatenate(heads), len(ids)


def write_bands(work: Workspace, task: DataTask, output: Output) -> dict[str, Any]:
    """Find near pairs among the documents that share one band, in one part of its hashes; returns the counters."""
    stage = work.stage(task.stage)
    files = SignatureFiles.of(work, stage.segment)
    bands = num_bands(_config(work, stage.segment).threshold)
    band, part = task.number % bands, task.number // bands
    parts = work.num_tasks(stage) // bands
    hashes, ids = _of_band(work, stage.segment, (band, bands), (part, parts))
    order = np.argsort(hashes, kind="stable")  # ids of equal hashes stay in their order
    hashes, ids = hashes[order], ids[order]
    shared = np.zeros(len(ids), bool)
    same = hashes[1:] == hashes[:-1]
    shared[1:] |= same
    shared[:-1] |= same
    hashes, ids = hashes[shared], ids[shared]
    near, heads, left = grouped_by_heads(hashes, ids, files, MOST_HEADS)
    with output.file(EDGES) as file:
        file.write(np.stack([heads, near], 1).tobytes())
    return {"candidates": len(ids), "edges": len(near), "left": left}


def _of_band(
    work: Workspace, segment: int, band: tuple[int, int], part: tuple[int, int]
) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """The hashes of a band, one of so many, and the ids of their documents, of a part of the hashes, one of so many.

    What has gone as an exact duplicate is looked at no more.
    """
    documents = work.program.documents(segment).name
    all_hashes, all_ids = [], []
    for chunk in range(len(work.plan.chunks)):
        path = work.checked(DataTask(documents, chunk), BANDS)
        rows = path.stat().st_size // (8 * band[1])
        hashes = np.fromfile(path, np.uint64, rows, offset=8 * rows * band[0])
        wanted = hashes % np.uint64(part[1]) == part[0]
        wanted[list(removed_rows(work, segment, chunk, "bands"))] = False
        chosen = np.flatnonzero(wanted)
        all_hashes.append(hashes[chosen])
        all_ids.append(chosen.astype(np.uint64) + np.uint64(row_id(chunk, 0)))
    empty = np.empty(0, np.uint64)
    return np.concatenate([empty, *all_hashes]), np.concatenate([empty, *all_ids])


def write_clusters(work: Workspace, task: DataTask, output: Output) -> dict[str, Any]:
    """Join near pairs to clusters, and remove all but the first document of each; returns the counters.

    A chain of near pairs can lead far away: what is further from the first than CHAIN allows gets a head of its own.
    """
    stage = work.stage(task.stage)
    files = SignatureFiles.of(work, stage.segment, CHAIN)
    bands = next(other for other in work.program.stages if other.kind == "bands" and other.segment == stage.segment)
    paths = [work.checked(DataTask(bands.name, number), EDGES) for number in range(work.num_tasks(bands))]
    edges = np.concatenate(
        [np.empty((0, 2), np.uint64), *(np.fromfile(path, np.uint64).reshape(-1, 2) for path in paths)]
    )
    ids, places = np.unique(edges, return_inverse=True)
    labels = connected(len(ids), places.reshape(-1, 2))
    order = np.lexsort((ids, labels))
    removed, heads, _ = grouped_by_heads(labels[order], ids[order], files, None)
    write_removals(output, removed, heads)
    return {"clusters": len(np.unique(labels)), "removed": len(removed)}


def connected(number: int, edges: NDArray[np.int64]) -> NDArray[np.int64]:
    """The smallest member of the component of each of so many nodes, from edges [n, 2].

    Labels of the smaller end pass over edges, and of a label's label to its holder, until nothing changes (Shiloach and
    Vishkin 1982): about as many rounds as the logarithm of the longest path.
    """
    labels = np.arange(number)
    while len(edges):
        first, second = labels[edges[:, 0]], labels[edges[:, 1]]
        lower = np.minimum(first, second)
        before = labels.copy()
        np.minimum.at(labels, first, lower)
        np.minimum.at(labels, second, lower)
        while (labels[labels] != labels).any():
            labels = labels[labels]
        if (labels == before).all():
            break
    return labels
