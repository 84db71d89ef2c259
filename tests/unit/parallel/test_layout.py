"""Which rank does what: against numpy's reshape, over drawn sizes."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmtrain.config.schema import ParallelConfig
from llmtrain.parallel.layout import AXES, Layout, plan_chunks, plan_layout, plan_stages

SIZE = st.integers(1, 4)
LAYOUTS = st.builds(Layout, tensor=SIZE, context=SIZE, data=SIZE, pipeline=SIZE)


def grid(layout: Layout) -> np.ndarray:
    """Ranks by (pipeline, data, context, tensor): tensor fastest."""
    return np.arange(layout.world_size).reshape(layout.pipeline, layout.data, layout.context, layout.tensor)


@given(LAYOUTS)
def test_coordinates_and_ranks_are_those_of_the_grid(layout: Layout) -> None:
    for place, rank in np.ndenumerate(grid(layout)):
        found = layout.coordinates(int(rank))
        assert (found.pipeline, found.data, found.context, found.tensor) == place
        assert layout.rank(found) == rank


@given(LAYOUTS, st.sampled_from([axes for n in range(5) for axes in combinations(AXES, n)]))
def test_groups_are_slices_of_the_grid(layout: Layout, axes: tuple[str, ...]) -> None:
    numbers = [3 - AXES.index(axis) for axis in axes]  # numpy's axes: the slowest is 0
    inside = sorted(numbers)
    size = int(np.prod([grid(layout).shape[n] for n in inside]))
    wanted = np.moveaxis(grid(layout), inside, range(4 - len(inside), 4)).reshape(-1, size)
    groups = list(layout.groups(*axes))
    assert groups == wanted.tolist()
    assert sorted(rank for group in groups for rank in group) == list(range(layout.world_size))


def test_the_ranks_that_talk_most_are_neighbours() -> None:
    layout = Layout(tensor=2, context=2, data=2, pipeline=2)
    first = {axis: next(layout.groups(axis)) for axis in AXES}
    assert first == {"tensor": [0, 1], "context": [0, 2], "data": [0, 4], "pipeline": [0, 8]}
    assert next(layout.groups("data", "context")) == [0, 2, 4, 6]


@given(SIZE, SIZE, SIZE, SIZE)
def test_data_parallel_is_what_the_other_axes_leave(tensor: int, context: int, pipeline: int, data: int) -> None:
    parallel = ParallelConfig(tensor=tensor, context=context, pipeline=pipeline, sequence=tensor > 1)
    layout = plan_layout(parallel, parallel.replica_size * data)
    assert layout.sizes == (tensor, context, data, pipeline)
    assert layout.sequence_parts == context * tensor


def test_a_world_that_the_axes_do_not_divide_is_refused() -> None:
    with pytest.raises(AssertionError):
        plan_layout(ParallelConfig(tensor=2), 3)


@given(SIZE, st.integers(1, 3), st.data())
def test_every_layer_is_in_one_chunk_in_model_order(pipeline: int, virtual: int, data: st.DataObject) -> None:
    layout = Layout(pipeline=pipeline, virtual_pipeline=virtual)
    pieces = layout.num_chunks
    split = data.draw(st.none() | st.lists(st.integers(0, 5), min_size=pieces, max_size=pieces))
    num_layers = data.draw(st.integers(pieces, 24)) if split is None else sum(split)
    if num_layers == 0:
        split = None
    stages = plan_stages(layout, num_layers, split)
    assert [len(chunks) for chunks in stages] == [virtual] * pipeline
    in_order = [stages[c % pipeline][c // pipeline] for c in range(pieces)]
    assert [layer for chunk in in_order for layer in chunk.layers] == list(range(num_layers))
    assert [chunk.first for chunk in in_order] == [True] + [False] * (pieces - 1)
    assert [chunk.last for chunk in in_order] == [False] * (pieces - 1) + [True]
    sizes = [len(chunk.layers) for chunk in in_order]
    assert sizes == (split or sorted(sizes, reverse=True))
    assert split or max(sizes) - min(sizes) <= 1
    assert all(plan_chunks(layout, num_layers, split, rank) == stages[rank] for rank in range(pipeline))


def test_a_split_of_other_layers_is_refused() -> None:
    for split in ([1, 1], [2, 2, 1]):
        with pytest.raises(AssertionError):
            plan_stages(Layout(pipeline=2), 4, split)
