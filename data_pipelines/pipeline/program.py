"""What a pipeline does, stage by stage: documents in chunks, then steps over groups of them, then tokens and shards.

The list of steps is cut at those that look at all documents at once. Each stage is a list of tasks that do not look at
one another, so any number of workers may do them in any order.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from llmtrain.config.pipelines.schema import PipelineConfig
from llmtrain.config.pipelines.steps import ExactDedupStep, NearDedupStep, StepConfig

Kind = Literal[
    "documents", "count", "exact", "bands", "clusters", "caps", "tokenizer", "tokens", "order", "shards", "export"
]

REMOVING: tuple[Kind, ...] = ("exact", "clusters", "caps")
"""Stages that remove documents, in their order behind one segment: each sees what those before have left."""


@dataclass(frozen=True)
class PipelineStage:
    """One stage. `segment` numbers the stages of kind `documents`; others name the one whose documents they look at."""

    name: str
    kind: Kind
    segment: int = 0


@dataclass(frozen=True)
class Segment:
    """Steps that are done in one pass over the documents, and the steps over groups that follow them, if any do.

    Near duplicates right behind exact ones need no pass of their own: both are found in what one pass has noted.
    """

    steps: tuple[StepConfig, ...]
    exact: bool = False
    near: NearDedupStep | None = None


@dataclass(frozen=True)
class Program:
    """Everything that follows from a pipeline's configuration about the order of work."""

    config: PipelineConfig

    @cached_property
    def segments(self) -> tuple[Segment, ...]:
        """The steps, cut behind each step over groups."""
        segments: list[Segment] = []
        steps: list[StepConfig] = []
        for step in self.config.steps:
            near = step.section if isinstance(step.section, NearDedupStep) else None
            if near is not None and not steps and segments and segments[-1].near is None:
                segments[-1] = replace(segments[-1], near=near)
            elif near is not None or isinstance(step.section, ExactDedupStep):
                segments.append(Segment(tuple(steps), near is None, near))
                steps = []
            else:
                steps.append(step)
        if steps or not segments:
            segments.append(Segment(tuple(steps)))
        return tuple(segments)

    @cached_property
    def stages(self) -> tuple[PipelineStage, ...]:
        """Every stage in its order."""
        stages: list[PipelineStage] = []
        for number, segment in enumerate(self.segments):
            stages.append(PipelineStage(f"documents-{number}", "documents", number))
            if segment.exact or segment.near is not None:
                stages.append(PipelineStage(f"count-{number}", "count", number))
            if segment.exact:
                stages.append(PipelineStage(f"exact-{number}", "exact", number))
            if segment.near is not None:
                stages.append(PipelineStage(f"bands-{number}", "bands", number))
                stages.append(PipelineStage(f"clusters-{number}", "clusters", number))
        last, config = len(self.segments) - 1, self.config
        if self.has_caps:
            stages.append(PipelineStage("caps", "caps", last))
        if config.tokenizer is not None and config.tokenizer.train is not None:
            stages.append(PipelineStage("tokenizer", "tokenizer", last))
        if config.tokenizer is not None:
            stages += [PipelineStage(name, name, last) for name in ("tokens", "order", "shards")]
        if config.tokenizer is None or config.write.documents:
            stages.append(PipelineStage("export", "export", last))
        return tuple(stages)

    @cached_property
    def has_caps(self) -> bool:
        """Sources are cut to a size."""
        return any(source.max_documents or source.max_bytes for source in self.config.read)

    def title(self, stage: PipelineStage) -> str:
        """What a stage does, for people."""
        names = ", ".join(step.name for step in self.segments[stage.segment].steps)
        titles: dict[Kind, str] = {
            "documents": f"{'steps' if stage.segment else 'read'}{f' ({names})' if names else ''}",
            "exact": "exact duplicates",
            "bands": "near duplicates: pairs",
            "clusters": "near duplicates: clusters",
            "export": "documents written",
        }
        return titles.get(stage.kind, stage.kind)

    def documents(self, segment: int) -> PipelineStage:
        """The stage that writes a segment's documents."""
        return next(stage for stage in self.stages if stage.kind == "documents" and stage.segment == segment)

    def removals(self, segment: int, before: Kind | None = None) -> Sequence[PipelineStage]:
        """The stages whose removals hold for the documents of a segment: all, or those before another kind of stage."""
        kinds = REMOVING[: {"bands": 1, "caps": 2}.get(before or "", len(REMOVING))]
        return [stage for stage in self.stages if stage.kind in kinds and stage.segment == segment]
