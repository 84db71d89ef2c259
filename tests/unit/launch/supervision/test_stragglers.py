"""Which ranks are called slow, from the work that they tell."""

from collections.abc import Sequence

import pytest

from launch.rank.signals import NUM_WINDOWS, HeartbeatBoard, WorkWindow
from launch.supervision.attempt import watches_speed
from launch.supervision.stragglers import LEAST_USUAL_WINDOWS, SLOW_WINDOWS, Judge, Straggler
from tests.unit.config.small_run import run

ALIKE = [[0, 1, 2, 3]]
STAGES = [[0], [1]]


def window(number: int, step: float, data: float = 0.0) -> WorkWindow:
    places = {"data": "read (shards.py:7)", "step": "forward (mlp.py:9)"}
    return WorkWindow(6 + 5 * number, {"data": data, "step": step}, places)  # type: ignore[arg-type]


def judged(judge: Judge, work: Sequence[float], first: int, count: int) -> list[Straggler]:
    """What is found in windows in which the ranks work so many seconds in the step."""
    numbers = range(first, first + count)
    return [found for number in numbers for found in judge.judge([window(number, seconds) for seconds in work])]


def test_a_rank_slower_than_its_peers_is_named_once() -> None:
    judge = Judge(ALIKE, 0.7)
    assert judged(judge, [1, 1.1, 1.9, 0.9], 0, SLOW_WINDOWS - 1) == []
    (found,) = judged(judge, [1, 1.1, 1.9, 0.9], 2, 10)
    assert (found.rank, found.phase, found.place, found.step) == (2, "step", "forward (mlp.py:9)", 16)
    assert found.score == pytest.approx(1 / 1.9)


def test_it_is_named_again_only_after_it_has_recovered() -> None:
    judge = Judge(ALIKE, 0.7)
    slow, well = [1, 1, 2, 1], [1, 1, 1, 1]
    assert len(judged(judge, slow, 0, 10)) == 1
    assert judged(judge, well, 10, 1) == []
    assert len(judged(judge, slow, 11, 10)) == 1


def test_slow_now_and_then_is_not_slow() -> None:
    judge = Judge(ALIKE, 0.7)
    for number in range(20):
        work = [1, 1, 2, 1] if number % SLOW_WINDOWS else [1, 1, 1, 1]
        assert judged(judge, work, number, 1) == []


@pytest.mark.parametrize(("work", "limit", "named"), [(1.5, 0.7, 1), (1.3, 0.7, 0), (1.3, 0.8, 1), (1.5, 0.6, 0)])
def test_the_limit_decides(work: float, limit: float, named: int) -> None:
    assert len(judged(Judge([[0, 1]], limit), [1, work], 0, 5)) == named


def test_a_millisecond_does_not_count() -> None:
    assert judged(Judge([[0, 1]], 0.7), [0.4e-2, 0.8e-2], 0, 500) == []
    assert len(judged(Judge([[0, 1]], 0.7), [0.4e-2, 1.2e-2], 0, 500)) == 1


def test_slow_for_a_moment_is_not_slow() -> None:
    """Where steps are short, a rank without a processor is slow for some windows."""
    judge = Judge([[0, 1]], 0.7)
    for number in range(0, 100, 5):
        assert judged(judge, [0.1, 0.2], number, 4) + judged(judge, [0.1, 0.1], number, 1) == []
    (found,) = judged(judge, [0.1, 0.2], 100, 20)
    assert found.step == window(104, 0).step


def test_the_section_is_where_it_needs_more_than_its_peers() -> None:
    judge = Judge([[0, 1]], 0.7)
    found = []
    for number in range(3):
        found += judge.judge([window(number, step=1.0), window(number, step=1.0, data=0.8)])
    assert [(straggler.rank, straggler.phase, straggler.place) for straggler in found] == [
        (1, "data", "read (shards.py:7)")
    ]


def test_uneven_stages_are_compared_with_what_they_needed_before() -> None:
    judge = Judge(STAGES, 0.7)
    assert judged(judge, [0.3, 1.5], 0, 20) == []
    (found,) = judged(judge, [0.8, 1.5], 20, 5)
    assert found.rank == 0
    assert found.score == pytest.approx(0.3 / 0.8)


def test_stages_that_all_become_slower_are_not_slow() -> None:
    """Longer sequences, a busy machine: nobody waits more than before."""
    judge = Judge(STAGES, 0.7)
    assert judged(judge, [0.3, 1.5], 0, LEAST_USUAL_WINDOWS) == []
    assert judged(judge, [0.6, 3.0], 5, 20) == []


def test_windows_go_through_shared_memory() -> None:
    board = HeartbeatBoard(2, step=0)
    told = [window(number, 0.1 * number, data=number) for number in range(3 * NUM_WINDOWS)]
    for each in told:
        board.add_window(0, each)
    assert board.num_windows() == 0
    for each in told:
        board.add_window(1, each)
    assert board.num_windows() == len(told)
    for number in range(2 * NUM_WINDOWS, 3 * NUM_WINDOWS):
        assert board.windows(number) == [told[number]] * 2


def test_a_long_place_is_cut() -> None:
    board = HeartbeatBoard(1, step=0)
    place = "é" * 100
    board.add_window(0, WorkWindow(1, {"data": 0.0, "step": 1.0}, {"data": "", "step": place}))
    assert board.windows(0)[0].places["step"] == place[:60]


def test_no_rank_is_measured_unless_a_run_asks_for_it() -> None:
    ranks = {"launch": {"num_workers": 2, "backend": "local"}}
    assert not watches_speed(run(**ranks))
    assert watches_speed(run(**ranks, observe={"straggler_score": 0.7}))
    assert not watches_speed(run(observe={"straggler_score": 0.7})), "nobody waits for a rank that is alone"
