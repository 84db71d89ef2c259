"""The memory of the pass over near duplicates: a bound for each million documents, whatever lies on the disk."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data_pipelines.duplicates.near import EDGES
from data_pipelines.duplicates.signatures import BANDS, NUM_HASHES, SIGNATURES, band_hashes
from data_pipelines.pipeline.chunks import FilePiece, InputChunk
from data_pipelines.pipeline.plan import Plan, result_settings
from data_pipelines.pipeline.stages.document_files import REMOVED
from data_pipelines.pipeline.tasks import WorkspaceKey, perform
from data_pipelines.pipeline.work import DONE_FOLDER, DataTask, Done, Output, Workspace
from llmtrain.config.pipelines.schema import PipelineConfig
from tests.support.memory import peak_growth

DOCUMENTS_OF_A_CHUNK = 20_000
PLANTED = 100
"""Documents of a chunk that are near one of the chunk before."""

BYTES_OF_A_DOCUMENT = 50
"""10 million take 390 MB on the machine of docs/performance.md: 39 for each."""
BYTES_OF_ALL = 200 << 20
"""What does not grow with the documents: pairs that are compared at a time, libraries."""

THRESHOLD = 0.8


def make_workspace(folder: Path, chunks: int) -> Workspace:
    """Signatures of random documents, a few of them near others, as the stage before has left them."""
    config = PipelineConfig.model_validate(
        {"name": "near", "read": [{"path": "nowhere"}], "steps": [{"near_dedup": {"threshold": THRESHOLD}}]}
    )
    plan = Plan(result_settings(config), {}, {}, (), (InputChunk(0, (FilePiece(0, 1),)),) * chunks, {})
    (folder / DONE_FOLDER).mkdir()
    plan.write(folder)
    work = Workspace(folder, config, plan)
    draw = np.random.default_rng(1)
    before = np.zeros((0, NUM_HASHES), np.uint32)
    for number in range(chunks):
        minima = draw.integers(0, 2**32, (DOCUMENTS_OF_A_CHUNK, NUM_HASHES), np.uint32)
        if len(before):
            minima[:PLANTED] = before
            minima[:PLANTED, ::16] ^= np.uint32(1)  # an eighth is another
        before = minima[-PLANTED:]

        def write(output: Output, minima: np.ndarray = minima) -> dict[str, object]:
            with output.file(SIGNATURES) as file:
                file.write(minima.astype(np.uint16).tobytes())
            with output.file(BANDS) as file:
                file.write(band_hashes(minima, THRESHOLD).tobytes())
            return {"kept": {"documents": len(minima), "bytes": 0}}

        work.run(DataTask("documents-0", number), write)
    return work


def done(work: Workspace, stage: str, number: int = 0) -> Done:
    result = perform(WorkspaceKey.of(work), DataTask(stage, number))
    assert isinstance(result, Done), result
    return result


def measured(folder: Path, chunks: int) -> None:
    """Makes signatures and prints by how much this process grows during each kind of task."""
    work = make_workspace(folder, chunks)
    tasks = done(work, "count-0").counters["bands"]
    bands = peak_growth(lambda: done(work, "bands-0", 0))
    for number in range(1, tasks):
        done(work, "bands-0", number)
    clusters = peak_growth(lambda: done(work, "clusters-0"))
    removed = work.path(DataTask("clusters-0", 0), REMOVED).stat().st_size // 16
    edges = sum(work.path(DataTask("bands-0", number), EDGES).stat().st_size for number in range(tasks)) // 16
    print(bands, clusters, removed, edges)


@pytest.mark.parametrize("chunks", [10, pytest.param(500, marks=pytest.mark.whole_grid)])
def test_the_pass_takes_so_much_for_each_document(tmp_path: Path, chunks: int) -> None:
    code = f"from tests.unit.data_pipelines.test_near_memory import *; measured(Path({str(tmp_path)!r}), {chunks})"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    bands, clusters, removed, edges = map(int, ended.stdout.split())
    # An eighth of the minima differ: a similarity of 0.875, of which bands find nearly all.
    planted = PLANTED * (chunks - 1)
    assert 0.98 * planted <= removed <= planted < edges
    allowed = BYTES_OF_A_DOCUMENT * chunks * DOCUMENTS_OF_A_CHUNK + BYTES_OF_ALL
    assert bands < allowed and clusters < allowed, (bands, clusters)
