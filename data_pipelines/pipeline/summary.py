"""The counts of a finished pipeline, added up from the records of its tasks in their order: the same for every run."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

from data_pipelines.pipeline.program import PipelineStage
from data_pipelines.pipeline.stages.document_files import document_at, iter_removals
from data_pipelines.pipeline.work import DataTask, Workspace

EXAMPLES = 8
"""Documents that are shown of each reason; of duplicates pairs."""
_EXCERPT = 400


def summarized(work: Workspace) -> dict[str, Any]:
    """Sources, steps, what is kept, tokens and shards, as plain values."""
    return {
        "name": work.config.name,
        "sources": _sources(work),
        "steps": [step for segment in range(len(work.program.segments)) for step in _steps(work, segment)],
        "kept": _kept(work),
        **_outputs(work),
    }


def _records(work: Workspace, stage: str) -> Iterator[dict[str, Any]]:
    for number in range(work.num_tasks(work.stage(stage))):
        yield work.require_done(DataTask(stage, number)).counters


def _sources(work: Workspace) -> list[dict[str, Any]]:
    """What was read of each source, and what of it is left."""
    sources = [
        {
            "name": source.name or source.path,
            "files": 0,
            "documents": 0,
            "bytes": 0,
            "left_out": Counter(),
            "examples": {},
            "kept": 0,
            "tokens": 0,
        }
        for source in work.config.read
    ]
    for counters in _records(work, "documents-0"):
        source, read = sources[counters["source"]], counters["read"]
        for key in ("files", "documents", "bytes"):
            source[key] += read[key]
        source["left_out"].update(read["left_out"])
        for kind, names in read["examples"].items():
            _extend(source["examples"].setdefault(kind, []), names)
    stages = {stage.kind for stage in work.program.stages}
    for counters in _records(work, "tokens" if "tokens" in stages else "export"):
        source = sources[counters["source"]]
        source["kept"] += counters["documents"]
        source["tokens"] += counters.get("tokens", 0)
    for source in sources:
        source["left_out"] = dict(sorted(source["left_out"].items()))
    return sources


def _extend(examples: list[Any], others: list[Any]) -> None:
    examples += others[: EXAMPLES - len(examples)]


def _steps(work: Workspace, segment: int) -> list[dict[str, Any]]:
    """The steps of a segment, and the step over groups behind it."""
    totals: list[dict[str, Any]] = [
        {"name": step.name, "seen": 0, "dropped": Counter(), "changed": Counter(), "examples": {}}
        for step in work.program.segments[segment].steps
    ]
    for counters in _records(work, work.program.documents(segment).name):
        for total, step in zip(totals, counters["steps"], strict=True):
            total["seen"] += step["seen"]
            total["dropped"].update(step["dropped"])
            total["changed"].update(step["changed"])
            for reason, examples in step["examples"].items():
                _extend(total["examples"].setdefault(reason, []), examples)
    for total in totals:
        total["dropped"], total["changed"] = (dict(total[key].most_common()) for key in ("dropped", "changed"))
    left = sum(counters["kept"]["documents"] for counters in _records(work, work.program.documents(segment).name))
    for stage in work.program.removals(segment):
        totals.append(_group(work, stage, left))
        left -= sum(totals[-1]["dropped"].values())
    return totals


def _group(work: Workspace, stage: PipelineStage, seen: int) -> dict[str, Any]:
    """A stage over groups, which sees so many documents, as a step."""
    names = {"exact": "exact_dedup", "clusters": "near_dedup", "caps": "caps"}
    documents = work.program.documents(stage.segment).name
    removed, examples = 0, []
    for removals in iter_removals(work, stage):
        removed += len(removals)
        # A few from all over the collection.
        step = max(1, len(removals) // EXAMPLES)
        for gone, head in removals[::step][: EXAMPLES - len(examples)].tolist():
            document, kept = (document_at(work, documents, place) for place in (gone, head))
            first = "" if stage.kind == "caps" else f"{kept.id}\n{kept.text[:_EXCERPT]}"
            examples.append((document.id, document.text[:_EXCERPT], first))
    reason = "above the cap" if stage.kind == "caps" else "duplicate"
    return {
        "name": names[stage.kind],
        "seen": seen,
        "dropped": {reason: removed} if removed else {},
        "changed": {},
        "examples": {reason: examples} if examples else {},
    }


def _kept(work: Workspace) -> dict[str, Any]:
    """Lengths and languages behind the last step of documents, before what groups and caps have removed there."""
    lengths: Counter[int] = Counter()
    languages: Counter[str] = Counter()
    for counters in _records(work, work.program.documents(len(work.program.segments) - 1).name):
        lengths.update({int(power): count for power, count in counters["kept"]["lengths"].items()})
        languages.update(counters["kept"]["languages"])
    return {
        "lengths": {str(power): lengths[power] for power in sorted(lengths)},
        "languages": dict(languages.most_common()),
    }


def _outputs(work: Workspace) -> dict[str, Any]:
    kinds = {stage.kind for stage in work.program.stages}
    found: dict[str, Any] = {}
    if "shards" in kinds:
        splits: dict[str, dict[str, int]] = {}
        for counters in _records(work, "shards"):
            split = splits.setdefault(counters["split"], {"shards": 0, "documents": 0, "tokens": 0})
            split["shards"] += 1
            split["documents"] += counters["samples"]
            split["tokens"] += counters["tokens"]
        found["splits"] = splits
    if "tokenizer" in kinds:
        found["tokenizer"] = work.require_done(DataTask("tokenizer", 0)).counters
    if "export" in kinds:
        exported = list(_records(work, "export"))
        found["documents"] = {key: sum(counters[key] for counters in exported) for key in ("documents", "bytes")}
    return found
