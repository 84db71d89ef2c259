"""How a task of each kind of stage is done, in whatever process: files in, files out, counters."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from data_pipelines.duplicates.exact import num_parts, write_exact
from data_pipelines.duplicates.near import num_band_tasks, write_bands, write_clusters
from data_pipelines.pipeline.plan import PLAN_NAME, read_plan
from data_pipelines.pipeline.program import Kind
from data_pipelines.pipeline.stages.caps import write_caps
from data_pipelines.pipeline.stages.document_files import kept_documents, written_documents
from data_pipelines.pipeline.stages.documents import write_documents
from data_pipelines.pipeline.stages.tokens import write_order, write_shard, write_tokens
from data_pipelines.pipeline.stages.trained_tokenizer import write_tokenizer
from data_pipelines.pipeline.work import DamagedWorkError, DataTask, Done, Output, Workspace
from llmtrain.config.pipelines.schema import PipelineConfig
from llmtrain.errors import DataError, LlmtrainError

Handler = Callable[[Workspace, DataTask, Output], dict[str, Any]]


def _write_count(work: Workspace, task: DataTask, output: Output) -> dict[str, Any]:
    """How many tasks the stages over groups have, from how many documents there are."""
    segment = work.stage(task.stage).segment
    stage = work.program.documents(segment).name
    chunks = range(len(work.plan.chunks))
    documents = sum(work.require_done(DataTask(stage, number)).counters["kept"]["documents"] for number in chunks)
    near = work.program.segments[segment].near
    bands = 0 if near is None else num_band_tasks(near, documents)
    return {"documents": documents, "exact": num_parts(documents), "bands": bands}


def _write_export(work: Workspace, task: DataTask, output: Output) -> dict[str, Any]:
    """The documents of a chunk that are left in the end."""
    documents = size = 0
    with written_documents(output) as write:
        for found in kept_documents(work, len(work.program.segments) - 1, task.number):
            write(found.document)
            documents += 1
            size += len(found.document.text.encode())
    return {"source": work.plan.chunks[task.number].source, "documents": documents, "bytes": size}


HANDLERS: dict[Kind, Handler] = {
    "documents": write_documents,
    "count": _write_count,
    "exact": write_exact,
    "bands": write_bands,
    "clusters": write_clusters,
    "caps": write_caps,
    "tokenizer": write_tokenizer,
    "tokens": write_tokens,
    "order": write_order,
    "shards": write_shard,
    "export": _write_export,
}


@dataclass(frozen=True)
class TaskFailure:
    """Why a task is not done. `damaged` names a task whose file has to be written again first."""

    message: str
    exit_code: int
    damaged: DataTask | None = None


@dataclass(frozen=True)
class WorkspaceKey:
    """Where the work is: little enough to be sent with every task. The plan itself is read once by each process."""

    folder: Path
    config: PipelineConfig
    plan_id: str

    @classmethod
    def of(cls, work: Workspace) -> "WorkspaceKey":
        return cls(work.folder, work.config, work.plan.id)


@lru_cache(maxsize=1)
def _work_at(place: WorkspaceKey, changed: int) -> Workspace:
    plan = read_plan(place.folder)
    if plan is None or plan.id != place.plan_id:
        raise DataError(f"{place.folder / PLAN_NAME}: is not the plan of this pipeline any more. Start it again.")
    return Workspace(place.folder, place.config, plan)


def perform(place: WorkspaceKey, task: DataTask) -> Done | TaskFailure:
    """Do a task. What a user can mend comes back as a value, which every executor can carry."""
    try:
        work = _work_at(place, (place.folder / PLAN_NAME).stat().st_mtime_ns)
    except LlmtrainError as error:
        return TaskFailure(str(error), error.exit_code)
    handler = HANDLERS[work.stage(task.stage).kind]
    try:
        return work.run(task, lambda output: handler(work, task, output))
    except DamagedWorkError as error:
        return TaskFailure(str(error), error.exit_code, error.task)
    except LlmtrainError as error:
        return TaskFailure(str(error), error.exit_code)
