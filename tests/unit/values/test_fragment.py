"""Arithmetic of boxes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmtrain.values.fragment import Box, tiling_problem

SHAPE = (4, 5, 3)


@st.composite
def boxes(draw: st.DrawFn, shape: tuple[int, ...] = SHAPE) -> Box:
    offsets = tuple(draw(st.integers(0, size)) for size in shape)
    sizes = tuple(draw(st.integers(0, size - offset)) for size, offset in zip(shape, offsets, strict=True))
    return Box(offsets, sizes)


def marked(box: Box, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    held = np.zeros(shape, dtype=int)
    held[box.slices_in(Box.whole(shape))] = 1
    return held


@given(boxes(), boxes())
def test_overlap_is_what_both_mark(first: Box, second: Box) -> None:
    shared = first.overlap(second)
    both = marked(first) * marked(second)
    assert (np.zeros(SHAPE) if shared is None else marked(shared)).tolist() == both.tolist()
    assert shared == second.overlap(first)
    if shared is not None:
        assert shared.num_elements == both.sum()


@given(st.lists(boxes((3, 2)), max_size=6))
def test_tiling_problem_agrees_with_counting_every_element(held: list[Box]) -> None:
    count = sum((marked(box, (3, 2)) for box in held), np.zeros((3, 2), dtype=int))
    assert (tiling_problem((3, 2), held) is None) == bool((count == 1).all())


@pytest.mark.parametrize(
    ("shape", "held", "words"),
    [
        ((4,), [Box((0,), (2,))], "hold 2 of 4"),
        ((4,), [Box((0,), (3,)), Box((2,), (2,))], "overlap"),
        ((4,), [Box((0,), (5,))], "not inside"),
        ((4, 4), [Box((0,), (16,))], "not inside"),
        ((), [], "hold 0 of 1"),
        ((0, 3), [Box((0, 0), (0, 4))], "not inside"),
    ],
)
def test_tiling_problem_says_what_is_wrong(shape: tuple[int, ...], held: list[Box], words: str) -> None:
    assert words in (tiling_problem(shape, held) or "")


@pytest.mark.parametrize(("shape", "held"), [((), [Box((), ())]), ((0, 3), [Box((0, 0), (0, 3))]), ((0,), [])])
def test_scalars_and_empty_tensors_tile(shape: tuple[int, ...], held: list[Box]) -> None:
    assert tiling_problem(shape, held) is None
