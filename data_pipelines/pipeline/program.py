"""What a pipeline does, stage by stage: documents in chunks, then steps over groups of them, then tokens and shards.

The list of steps is cut at those that look at all documents at once. Each stage is a list of tasks that do not look at
one another, so any number of workers may do them in any order.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from llmtrain.config.pipeline import PipelineConfig
from llmtrain.config.steps import NearDedupStep, StepConfig

Kind = Literal[
    "documents", "count", "exact", "bands", "clusters", "caps", "tokenizer", "tokens", "order", "shards", "export"
]

GROUP_STEPS = ("exact_dedup", "near_dedup")
"""Steps that look at all documents: what comes behind one sees what it has left."""


@dataclass(frozen=True)
class PipelineStage:
    """One stage. `segment` numbers the stages of kind `documents`; others name the one whose documents they look at."""

    name: str
    kind: Kind
    segment: int = 0


@dataclass(frozen=True)
class Segment:
    """Steps that are done in one pass over the documents, and the step over groups that follows them, if one does."""

    steps: tuple[StepConfig, ...]
    group: StepConfig | None = None


@dataclass(frozen=True)
class Program:
    """Everything that follows from a pipeline's configuration about the order of work."""

    config: PipelineConfig

    @cached_property
    def segments(self) -> tuple[Segment, ...]:
        """The steps, cut behind each step over groups. The last segment has none; it may be without steps."""
        segments: list[Segment] = []
        steps: list[StepConfig] = []
        for step in self.config.steps:
            if step.name in GROUP_STEPS:
                segments.append(Segment(tuple(steps), step))
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
            if segment.group is not None:
                stages.append(PipelineStage(f"count-{number}", "count", number))
            if segment.group is not None and segment.group.name == "exact_dedup":
                stages.append(PipelineStage(f"exact-{number}", "exact", number))
            elif segment.group is not None:
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

    def near_dedup(self, segment: int) -> NearDedupStep | None:
        """The keys of the near_dedup behind a segment; None where another step follows, or none."""
        group = self.segments[segment].group
        return group.section if group is not None and isinstance(group.section, NearDedupStep) else None

    def documents(self, segment: int) -> PipelineStage:
        """The stage that writes a segment's documents."""
        return next(stage for stage in self.stages if stage.kind == "documents" and stage.segment == segment)

    def removals(self, segment: int, with_caps: bool = True) -> Sequence[PipelineStage]:
        """The stages whose removals hold for the documents of a segment, for whoever reads them."""
        kinds = ("exact", "clusters", "caps") if with_caps else ("exact", "clusters")
        return [stage for stage in self.stages if stage.kind in kinds and stage.segment == segment]
