"""The stage `documents`: a chunk is read, or what the segment before has left of it, and goes through its steps.

Its file has a line of JSON for each document that is kept. Where a step over groups follows, there are files beside it
with what that step looks at: keys of texts, signatures and their bands.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from data_pipelines.documents import Document, DocumentStep, Dropped
from data_pipelines.pipeline.stages.document_files import kept_documents, written_documents
from data_pipelines.pipeline.stages.sidecars import sidecars_of
from data_pipelines.pipeline.work import DataTask, Output, Workspace
from data_pipelines.reading.formats import iter_records
from data_pipelines.reading.inputs import NAMED_EXAMPLES, ReadReport
from data_pipelines.reading.records import ReadOptions
from data_pipelines.steps.table import STEPS
from llmtrain.config.pipelines.steps import StepConfig
from llmtrain.errors import DataError

EXAMPLES = 3
"""Documents of a chunk that are shown of each reason for which a step drops some."""
FAILED = "error: "
"""Begins the reason of documents for which a step raised what nobody has thought of."""
_EXCERPT = 400
"""Characters of a document that are shown."""


@dataclass
class StepCount:
    """What a step has seen, dropped by reason and changed by name, and the first examples of what it dropped."""

    name: str
    seen: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    changed: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[tuple[str, str]]] = field(default_factory=dict)

    def drop(self, reason: str, document: Document) -> None:
        self.dropped[reason] += 1
        examples = self.examples.setdefault(reason, [])
        if len(examples) < EXAMPLES:
            examples.append((document.id, document.text[:_EXCERPT]))

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "seen": self.seen,
            "dropped": dict(self.dropped),
            "changed": dict(self.changed),
            "examples": self.examples,
        }


@lru_cache(maxsize=8)
def _steps(configs: tuple[StepConfig, ...]) -> list[DocumentStep]:
    """The steps of a segment, built once in a process: models and lists are loaded here."""
    return [STEPS[config.name].build(config.section) for config in configs]


def write_documents(work: Workspace, task: DataTask, output: Output) -> dict[str, Any]:
    """Do the task; returns its counters. Raises DataError for damaged inputs."""
    segment_number = work.stage(task.stage).segment
    segment = work.program.segments[segment_number]
    report = ReadReport(forgiving=True)
    if segment_number == 0:
        documents = _read(work, task.number, report)
    else:
        documents = (found.document for found in kept_documents(work, segment_number - 1, task.number))
    counts = [StepCount(step.name) for step in segment.steps]
    steps = list(zip(_steps(segment.steps), counts, strict=True))
    beside = sidecars_of(work, segment_number)
    totals = _Totals()
    with written_documents(output) as write:
        for document in documents:
            kept = _through(document, steps)
            if kept is None:
                continue
            totals.add(kept)
            write(kept)
            for other in beside:
                other.add(kept)
    for other in beside:
        other.write(output)
    return {
        "source": work.plan.chunks[task.number].source,
        "read": _read_counts(report),
        "steps": [count.to_json() for count in counts],
        "kept": totals.to_json(),
    }


def _read(work: Workspace, number: int, report: ReadReport) -> Iterator[Document]:
    chunk = work.plan.chunks[number]
    source = work.config.read[chunk.source]
    options = ReadOptions(source.text, source.separator, source.id, source.url)
    for piece in chunk.pieces:
        whole = piece.span is None or piece.span.begin == 0
        report.files += whole  # of a divided file the first piece counts
        try:
            file = work.plan.files[piece.file].input
            name = None if source.format == "auto" else source.format
            for record in iter_records(file, report, options, name, piece.span, source.longest_document):
                own = f"{file.name}:{record.place}" if record.place else file.name
                if not record.text or record.text.isspace():
                    report.leave_out("empty", own)
                    continue
                report.documents += 1
                report.text_bytes += len(record.text.encode())
                place = record.keys.get(source.id) if source.id else None
                url = record.keys.get(source.url or "url")
                yield Document(
                    str(place) if place is not None else own,
                    record.text,
                    source.name or source.path,
                    url if isinstance(url, str) else "",
                )
        except DataError as error:
            if source.on_damage == "fail":
                hint = f"read.{chunk.source}.on_damage=skip leaves out what is damaged, and counts it."
                raise DataError(f"{error} {hint}") from None
            report.leave_out("damaged", error)


def _through(document: Document, steps: list[tuple[DocumentStep, StepCount]]) -> Document | None:
    """The document behind all steps; None where one drops it."""
    for step, count in steps:
        count.seen += 1
        try:
            result = step(document, count.changed)
        except Exception as error:  # of a library, at a document that nobody has thought of: it is counted and named
            result = Dropped(f"{FAILED}{type(error).__name__}")
        if isinstance(result, Dropped):
            count.drop(result.reason, document)
            return None
        document = result
    return document


def _read_counts(report: ReadReport) -> dict[str, Any]:
    return {
        "files": report.files,
        "documents": report.documents,
        "bytes": report.text_bytes,
        "left_out": dict(report.left_out),
        "examples": {kind: names[:NAMED_EXAMPLES] for kind, names in report.examples.items()},
    }


@dataclass
class _Totals:
    """What is kept: number, bytes, lengths in powers of two, languages."""

    documents: int = 0
    bytes: int = 0
    lengths: Counter[int] = field(default_factory=Counter)
    languages: Counter[str] = field(default_factory=Counter)

    def add(self, document: Document) -> None:
        size = len(document.text.encode())
        self.documents += 1
        self.bytes += size
        self.lengths[size.bit_length()] += 1
        if document.language:
            self.languages[document.language] += 1

    def to_json(self) -> dict[str, Any]:
        lengths = {str(power): count for power, count in sorted(self.lengths.items())}
        return {
            "documents": self.documents,
            "bytes": self.bytes,
            "lengths": lengths,
            "languages": dict(sorted(self.languages.items())),
        }
