"""Sources that have a size: which of their documents stay follows from the seed, not from their order."""

from typing import Any

import numpy as np

from data_pipelines.pipeline.stages.document_files import removed_rows, row_id, write_removals
from data_pipelines.pipeline.stages.sidecars import SIZES
from data_pipelines.pipeline.work import DataTask, Output, Workspace


def write_caps(work: Workspace, task: DataTask, output: Output) -> dict[str, Any]:
    """Remove what is above max_documents and max_bytes of each source; returns the counters by source."""
    segment = work.stage(task.stage).segment
    documents = work.program.documents(segment)
    removed = [np.empty(0, np.uint64)]
    counters: dict[str, Any] = {}
    for number, source in enumerate(work.config.read):
        if not source.max_documents and not source.max_bytes:
            continue
        all_sizes, all_ids = [np.empty((0, 2), np.uint64)], [np.empty(0, np.uint64)]
        for chunk, planned in enumerate(work.plan.chunks):
            if planned.source != number:
                continue
            path = work.checked(DataTask(documents.name, chunk), SIZES)
            sizes = np.fromfile(path, np.uint64).reshape(-1, 2)
            kept = np.ones(len(sizes), bool)
            kept[list(removed_rows(work, segment, chunk, "caps"))] = False
            rows = np.flatnonzero(kept)
            all_sizes.append(sizes[rows])
            all_ids.append(rows.astype(np.uint64) + np.uint64(row_id(chunk, 0)))
        sizes, ids = np.concatenate(all_sizes), np.concatenate(all_ids)
        order = np.argsort(sizes[:, 0], kind="stable")
        stays = np.ones(len(ids), bool)
        if source.max_documents:
            stays[order[source.max_documents :]] = False
        if source.max_bytes:
            stays[order[np.cumsum(sizes[order, 1]) > source.max_bytes]] = False
        removed.append(ids[~stays])
        counters[str(number)] = {"seen": len(ids), "removed": int((~stays).sum())}
    gone = np.concatenate(removed)
    write_removals(output, gone, gone)
    return {"sources": counters}
