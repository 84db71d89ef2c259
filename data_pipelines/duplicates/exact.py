"""Documents with the same text: keys of all chunks, a part of the key space at a time, sorted."""

from typing import Any

import numpy as np

from data_pipelines.pipeline.stages.document_files import row_id, write_removals
from data_pipelines.pipeline.stages.sidecars import KEYS
from data_pipelines.pipeline.work import DataTask, Output, Workspace

DOCUMENTS_OF_A_PART = 8_000_000
"""A task holds about 100 bytes for each of its documents."""


def num_parts(documents: int) -> int:
    """The tasks of a stage for so many documents."""
    return max(1, -(-documents // DOCUMENTS_OF_A_PART))


def write_exact(work: Workspace, task: DataTask, output: Output) -> dict[str, Any]:
    """Remove, in one part of the key space, all documents but the first of each key; returns the counters."""
    documents = work.program.documents(work.stage(task.stage).segment)
    parts = work.num_tasks(work.stage(task.stage))
    kept_keys, kept_ids = [], []
    for chunk in range(len(work.plan.chunks)):
        path = work.checked(DataTask(documents.name, chunk), KEYS)
        keys = np.fromfile(path, np.uint64).reshape(-1, 2)
        # The first byte of a hash is as good as any number to deal the keys out by.
        rows = np.flatnonzero(keys[:, 0] % np.uint64(parts) == task.number)
        kept_keys.append(keys[rows])
        kept_ids.append(rows.astype(np.uint64) + np.uint64(row_id(chunk, 0)))
    keys, ids = np.concatenate(kept_keys), np.concatenate(kept_ids)
    del kept_keys, kept_ids
    order = np.lexsort((keys[:, 1], keys[:, 0]))  # stable: ids of equal keys stay in their order
    keys, ids = keys[order], ids[order]
    same = np.zeros(len(ids), bool)
    same[1:] = (keys[1:] == keys[:-1]).all(1)
    # The head of a group is the last document before it that begins one.
    heads = ids[np.maximum.accumulate(np.where(same, 0, np.arange(len(ids))))]
    write_removals(output, ids[same], heads[same])
    return {"seen": len(ids), "removed": int(same.sum())}
