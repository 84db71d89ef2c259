"""A layout as text and as numbers."""

import subprocess
import sys
from itertools import islice

from hypothesis import given
from hypothesis import strategies as st

from llmtrain.cli.tables import aligned
from llmtrain.parallel.layout import Layout
from llmtrain.plan.layout_text import MOST_EXAMPLES, layout_tables, plan_layout_outline

SMALL = """\
stage  layers                 data  ranks, | between context ranks
0      embeddings, 0-1 | 4-5  0      0  1 |  2  3
                              1      4  5 |  6  7
1      2-3 | 6-7, head        0      8  9 | 10 11
                              1     12 13 | 14 15"""

LARGE = """\
axis      size  stride  groups  first group
tensor    8     1       2,048   0 1 2 ... 7
context   2     8       8,192   0 8
data      16    16      1,024   0 16 32 ... 240
pipeline  64    256     256     0 256 512 ... 16128

stage  layers           ranks
0      embeddings, 0-1  0-255
1      2-3              256-511
2      4-5              512-767
3      6-7              768-1023
4      8-9              1024-1279
5      10-11            1280-1535
...    56 more          ...
62     124              15872-16127
63     125, head        16128-16383"""

SIZE = st.sampled_from([1, 2, 3, 5, 8, 24])


def drawn(layout: Layout, num_layers: int, split: list[int] | None = None) -> str:
    return "\n\n".join(aligned(*table) for table in layout_tables(plan_layout_outline(layout, num_layers, split)))


def test_a_small_grid_shows_every_rank() -> None:
    assert drawn(Layout(tensor=2, context=2, data=2, pipeline=2, virtual_pipeline=2), 8) == SMALL


def test_a_large_grid_is_summarized() -> None:
    assert drawn(Layout(tensor=8, context=2, data=16, pipeline=64), 126) == LARGE


def test_stages_without_layers_and_of_one_rank() -> None:
    text = drawn(Layout(pipeline=3, data=1), 4, split=[0, 4, 0])
    assert [" ".join(line.split()) for line in text.splitlines()[1:]] == [
        "0 embeddings, none 0 0",
        "1 0-3 0 1",
        "2 none, head 0 2",
    ]
    assert drawn(Layout(pipeline=40), 40).splitlines()[-1].split() == ["39", "39,", "head", "39"]


@given(st.builds(Layout, tensor=SIZE, context=SIZE, data=SIZE, pipeline=SIZE))
def test_the_outline_agrees_with_the_layout(layout: Layout) -> None:
    outline = plan_layout_outline(layout, 24, None)
    assert outline.sizes == {
        "tensor": layout.tensor,
        "context": layout.context,
        "data": layout.data,
        "pipeline": layout.pipeline,
    }
    for axis in outline.axes:
        first_groups = list(islice(layout.groups(axis.axis), MOST_EXAMPLES))
        assert axis.first_ranks == [group[0] for group in first_groups]
        assert axis.first_group == first_groups[0][:MOST_EXAMPLES]
        assert axis.num_groups * axis.size == layout.world_size
    for stage in outline.stages:
        assert {layout.coordinates(rank).pipeline for rank in (stage.first_rank, stage.last_rank)} == {stage.stage}
    assert [layer for stage in outline.stages for layer in stage.chunks[0]] == list(range(24))
    assert sum(stage.last_rank + 1 - stage.first_rank for stage in outline.stages) == layout.world_size
    assert [stage.embeddings for stage in outline.stages] == [stage.stage == 0 for stage in outline.stages]
    assert [stage.head for stage in reversed(outline.stages)] == [stage.stage == 0 for stage in outline.stages]


@given(st.builds(Layout, tensor=SIZE, context=SIZE, data=SIZE, pipeline=SIZE))
def test_a_drawing_is_short_whatever_the_world(layout: Layout) -> None:
    lines = drawn(layout, 24).splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 120


def test_drawing_needs_no_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; import llmtrain.plan.layout_text"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
