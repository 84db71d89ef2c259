"""The grid of ranks and their work. Pure arithmetic: imports no torch, knows no process group.

Ranks are numbered with the tensor axis fastest, then context, data, pipeline: ranks that talk most are neighbours.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, product

from llmtrain.config.schema import ParallelConfig, PipelineSchedule

AXES = ("tensor", "context", "data", "pipeline")
"""Mesh axes, the fastest first."""


@dataclass(frozen=True)
class Coordinates:
    """A rank's place on each axis."""

    tensor: int
    context: int
    data: int
    pipeline: int


@dataclass(frozen=True)
class Layout:
    """Sizes of the mesh axes; their product is the world size. `data` is what the other axes leave."""

    tensor: int = 1
    context: int = 1
    data: int = 1
    pipeline: int = 1
    virtual_pipeline: int = 1
    sequence: bool = False
    expert: int = 1
    """Expert ranks lie within the data and context axes: neighbours there hold different experts."""
    pipeline_schedule: PipelineSchedule | None = None

    @property
    def sizes(self) -> tuple[int, ...]:
        return (self.tensor, self.context, self.data, self.pipeline)

    @property
    def world_size(self) -> int:
        return self.tensor * self.context * self.data * self.pipeline

    @property
    def sequence_parts(self) -> int:
        """Parts that the sequence is cut into outside of attention and MLP."""
        return self.context * (self.tensor if self.sequence else 1)

    @property
    def num_chunks(self) -> int:
        """Pieces that the layers are cut into: virtual stages of all pipeline ranks."""
        return self.pipeline * self.virtual_pipeline

    @property
    def expert_data(self) -> int:
        """Ranks that hold the same part of the same experts."""
        return self.data * self.context // self.expert

    def expert_place(self, place: Coordinates) -> tuple[int, int]:
        """A rank's place on the expert axis, and among those that hold the same experts."""
        # Neighbours hold different experts, so that tokens are exchanged between neighbours.
        replica, expert = divmod(place.data * self.context + place.context, self.expert)
        return expert, replica

    def coordinates(self, rank: int) -> Coordinates:
        """The place of a rank."""
        places = []
        for size in self.sizes:
            rank, place = divmod(rank, size)
            places.append(place)
        return Coordinates(*places)

    def rank(self, place: Coordinates) -> int:
        """The rank at a place."""
        rank = 0
        for axis, size in reversed(list(zip(AXES, self.sizes, strict=True))):
            rank = rank * size + getattr(place, axis)
        return rank

    def groups(self, *axes: str) -> Iterator[list[int]]:
        """The groups of ranks that differ on these axes only; every rank is in one of them. Fast axes come first."""
        sizes: dict[str, int] = dict(zip(AXES, self.sizes, strict=True))
        others = [axis for axis in reversed(AXES) if axis not in axes]
        inside = [axis for axis in reversed(AXES) if axis in axes]
        for fixed in product(*(range(sizes[axis]) for axis in others)):
            place = dict(zip(others, fixed, strict=True))
            yield [
                self.rank(Coordinates(**place, **dict(zip(inside, moving, strict=True))))
                for moving in product(*(range(sizes[axis]) for axis in inside))
            ]


def plan_layout(parallel: ParallelConfig, world_size: int) -> Layout:
    """The layout of a configuration that keeps the arithmetic rules."""
    model_ranks = parallel.tensor * parallel.context * parallel.pipeline
    assert world_size % model_ranks == 0, "config/rules/parallel.py: axes_divide_world"
    return Layout(
        tensor=parallel.tensor,
        context=parallel.context,
        data=world_size // model_ranks,
        pipeline=parallel.pipeline,
        virtual_pipeline=parallel.virtual_pipeline,
        sequence=parallel.sequence,
        expert=parallel.expert,
        pipeline_schedule=parallel.pipeline_schedule,
    )


@dataclass(frozen=True)
class Chunk:
    """A run of consecutive layers on one pipeline rank, with what stands before the first and after the last layer."""

    layers: range
    first: bool
    last: bool


def plan_chunks(layout: Layout, num_layers: int, split: Sequence[int] | None, pipeline_rank: int) -> list[Chunk]:
    """The chunks of one pipeline rank."""
    return plan_stages(layout, num_layers, split)[pipeline_rank]


def plan_stages(layout: Layout, num_layers: int, split: Sequence[int] | None) -> list[list[Chunk]]:
    """The chunks of every pipeline rank. Chunk number c of the model is on rank c mod pipeline.

    `split` gives the layers of each chunk in model order; without it they are as equal as can be, larger ones first.
    """
    pieces = layout.num_chunks
    sizes = list(split) if split else [num_layers // pieces + (c < num_layers % pieces) for c in range(pieces)]
    assert len(sizes) == pieces and sum(sizes) == num_layers, "config/rules/parallel.py: split_names_every_layer"
    chunks = [
        Chunk(range(end - size, end), first=c == 0, last=c == pieces - 1)
        for c, (size, end) in enumerate(zip(sizes, accumulate(sizes), strict=True))
    ]
    # Dealt round: the interleaved schedule wants a rank's chunks a whole pipeline apart.
    return [chunks[rank :: layout.pipeline] for rank in range(layout.pipeline)]
