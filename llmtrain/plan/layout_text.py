"""A layout in words and text: which layers and ranks each pipeline stage has, which ranks form groups. Pure."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from llmtrain.parallel.layout import AXES, Chunk, Coordinates, Layout, plan_stages

MOST_EXAMPLES = 16
"""Ranks that are named of a group, and groups that are named of an axis."""

MOST_LINES, MOST_COLUMNS = 32, 16
"""Larger grids of ranks are summarized."""

SHOWN_STAGES = (6, 2)
"""Stages that a summary shows at the beginning and at the end."""


@dataclass(frozen=True)
class AxisGroups:
    """The groups of ranks that differ on one axis only: ranks `stride` apart. At most MOST_EXAMPLES are named."""

    axis: str
    size: int
    stride: int
    num_groups: int
    first_group: list[int]
    """Ranks of the first group."""
    first_ranks: list[int]
    """First rank of each group."""


@dataclass(frozen=True)
class StageRanks:
    """A pipeline stage: the layers of each of its chunks, what else it holds, and its ranks, which are consecutive."""

    stage: int
    chunks: list[list[int]]
    embeddings: bool
    head: bool
    first_rank: int
    last_rank: int


@dataclass(frozen=True)
class LayoutOutline:
    """A layout as plain numbers."""

    sizes: dict[str, int]
    virtual_pipeline: int
    pipeline_schedule: str | None
    sequence: bool
    expert: int
    axes: list[AxisGroups]
    stages: list[StageRanks]


def plan_layout_outline(layout: Layout, num_layers: int, split: Sequence[int] | None) -> LayoutOutline:
    """The groups of each axis and the ranks of each stage. Takes no longer for large worlds than for small ones."""
    stages = plan_stages(layout, num_layers, split)
    return LayoutOutline(
        sizes=dict(zip(AXES, layout.sizes, strict=True)),
        virtual_pipeline=layout.virtual_pipeline,
        pipeline_schedule=layout.pipeline_schedule,
        sequence=layout.sequence,
        expert=layout.expert,
        axes=_axis_groups(layout),
        stages=[_stage_ranks(layout, stage, chunks) for stage, chunks in enumerate(stages)],
    )


def _axis_groups(layout: Layout) -> list[AxisGroups]:
    found, stride = [], 1
    for axis, size in zip(AXES, layout.sizes, strict=True):
        num_groups = layout.world_size // size
        first_group = [stride * place for place in range(min(size, MOST_EXAMPLES))]
        # The ranks whose place on this axis is 0: runs of `stride`, as far apart as the axis reaches.
        first_ranks = [g // stride * stride * size + g % stride for g in range(min(num_groups, MOST_EXAMPLES))]
        found.append(AxisGroups(axis, size, stride, num_groups, first_group, first_ranks))
        stride *= size
    return found


def _stage_ranks(layout: Layout, stage: int, chunks: list[Chunk]) -> StageRanks:
    width = layout.world_size // layout.pipeline
    return StageRanks(
        stage=stage,
        chunks=[list(chunk.layers) for chunk in chunks],
        embeddings=any(chunk.first for chunk in chunks),
        head=any(chunk.last for chunk in chunks),
        first_rank=stage * width,
        last_rank=(stage + 1) * width - 1,
    )


def layout_tables(outline: LayoutOutline) -> list[tuple[list[str], list[list[str]]]]:
    """The grid of ranks, a header and rows; of a large one the groups of each axis, and the ranks of each stage."""
    tensor, context, data, pipeline = outline.sizes.values()
    layout = Layout(tensor, context, data, pipeline)
    if pipeline * data <= MOST_LINES and context * tensor <= MOST_COLUMNS:
        ranks = "ranks, | between context ranks" if context > 1 else "ranks"
        return [(["stage", "layers", "data", ranks], list(_grid_rows(layout, outline.stages)))]
    groups = [
        [
            axis.axis,
            f"{axis.size:,}",
            f"{axis.stride:,}",
            f"{axis.num_groups:,}",
            # `0 8 16 ... 120`
            " ".join(map(str, axis.first_group[: 4 if axis.size <= 4 else 3]))
            + (f" ... {(axis.size - 1) * axis.stride}" if axis.size > 4 else ""),
        ]
        for axis in outline.axes
    ]
    return [
        (["axis", "size", "stride", "groups", "first group"], groups),
        (["stage", "layers", "ranks"], _stage_rows(outline.stages)),
    ]


def _grid_rows(layout: Layout, stages: list[StageRanks]) -> Iterable[list[str]]:
    """One line per stage and data rank; tensor ranks side by side, a bar between context ranks."""
    digits = len(str(layout.world_size - 1))
    for stage in stages:
        for data in range(layout.data):
            ranks = " | ".join(
                " ".join(
                    f"{layout.rank(Coordinates(tensor, context, data, stage.stage)):>{digits}}"
                    for tensor in range(layout.tensor)
                )
                for context in range(layout.context)
            )
            yield [str(stage.stage), _holdings(stage), str(data), ranks] if data == 0 else ["", "", str(data), ranks]


def _stage_rows(stages: list[StageRanks]) -> list[list[str]]:
    rows = [
        [str(stage.stage), _holdings(stage), _run(range(stage.first_rank, stage.last_rank + 1))] for stage in stages
    ]
    before, after = SHOWN_STAGES
    if len(rows) <= before + after + 1:
        return rows
    return [*rows[:before], ["...", f"{len(rows) - before - after:,} more", "..."], *rows[-after:]]


def _holdings(stage: StageRanks) -> str:
    """`embeddings, 0-1 | 4-5, head`: a bar between the chunks of interleaved stages."""
    layers = " | ".join(_run(chunk) for chunk in stage.chunks)
    parts = ["embeddings"] if stage.embeddings else []
    return ", ".join([*parts, layers, *(["head"] if stage.head else [])])


def _run(numbers: Sequence[int]) -> str:
    """`0-3`."""
    if not numbers:
        return "none"
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}"
