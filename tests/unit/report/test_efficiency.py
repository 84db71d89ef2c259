"""Effective training time: each second and each step of constructed runs is where the definition puts it."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmtrain.report.efficiency import Efficiency, event_time, measure, run_efficiency

START = 1_700_000_000.0


def event(name: str, seconds: float, **facts: Any) -> dict[str, Any]:
    moment = datetime.fromtimestamp(START + seconds, UTC).isoformat(timespec="milliseconds")
    return {"time": moment, "event": name, **facts}


def row(step: int, seconds: float, step_seconds: float = 1.0, **cells: Any) -> dict[str, Any]:
    return {"step": step, "time": START + seconds, "loss": 1.0, "step_seconds": step_seconds, **cells}


def test_an_undisturbed_run() -> None:
    """10 s to start, 4 steps of 2 s, an evaluation of 1 s, and 1 s in which a checkpoint held training up."""
    rows = [
        *(row(step, 10 + 2 * step, 2.0) for step in (1, 2)),
        {"step": 2, "time": START + 15, "valid_loss": 1.0, "valid_seconds": 1.0},
        row(3, 18, 2.0, checkpoint_seconds=1.0),
        row(4, 20, 2.0),
    ]
    found = measure(rows, [event("started", 0, step=0)])
    assert found == Efficiency(
        wall_seconds=20.0, step_seconds=8.0, evaluate_seconds=1.0, checkpoint_seconds=1.0, starts=1
    )
    assert found.ratio == pytest.approx(0.4)
    assert found.other_seconds == pytest.approx(10.0)
    assert str(found) == "effective training time 40.0% of 0:00:20: no restart, no lost step"


def test_a_finished_run_that_is_extended_did_not_hang_in_between() -> None:
    """Done after 20 s; 1,000 s later it is asked for 2 more steps, which take 1 s each after 3 s of starting."""
    rows = [*(row(step, 10 + step) for step in range(1, 11)), row(11, 1024, resumed_from=10), row(12, 1025)]
    started = [event("started", 0, step=0), event("started", 1020, step=10)]
    extended = measure(rows, [started[0], event("done", 20, step=10), started[1]])
    assert (extended.wall_seconds, extended.down_seconds, extended.restarts) == (25.0, 0.0, 0)
    assert str(extended) == "effective training time 48.0% of 0:00:25: 1 extension"
    stopped = measure(rows, started)
    assert (stopped.wall_seconds, stopped.down_seconds, stopped.restarts) == (1025.0, 1000.0, 1)


KILLED = [
    event("started", 0, step=0),
    event("restarting", 15, step=6, saved_step=4),
    event("started", 20, step=4),
    event("failed", 32, step=8, saved_step=8),
    event("started", 100, step=8),
]
"""Killed after step 6, of which 4 were saved; failed after step 8, which was saved; started by a person much later."""

KILLED_ROWS = [
    *(row(step, 2 + step) for step in range(1, 7)),
    row(5, 25, resumed_from=4),
    *(row(step, 20 + step) for step in range(6, 9)),
    row(9, 105, resumed_from=8),
    row(10, 110),
]


def test_a_run_that_was_killed_failed_and_was_left_lying() -> None:
    found = measure(KILLED_ROWS, KILLED)
    assert (found.starts, found.restarts, found.lost_steps) == (3, 2, 2)
    assert found.wall_seconds == pytest.approx(110.0)
    assert (found.step_seconds, found.lost_seconds) == (10.0, 2.0)
    assert found.down_seconds == pytest.approx((20 - 8) + (100 - 28))
    assert found.other_seconds == pytest.approx(110 - 10 - 2 - 84)
    assert "9.1% of 0:01:50: 2 restarts, 2 lost steps" in str(found)


def test_steps_that_left_no_row_are_lost_too() -> None:
    """Three attempts end after step 6; rows are written for every fifth step, checkpoints after every fourth."""
    rows = [row(1, 1), row(5, 5), row(5, 25, resumed_from=4), row(5, 45, resumed_from=4), row(10, 50)]
    events = [event("started", 0, step=0)]
    for seconds in (7, 27):
        events += [event("restarting", seconds, step=6), event("started", seconds + 13, step=4)]
    found = measure(rows, events)
    assert found.lost_steps == 4
    assert found.lost_seconds == pytest.approx(2.0), "of the others it is not known how long they took"
    assert found.step_seconds == pytest.approx(10.0), "steps 2 to 4 stand in a row of which step 5 is lost"


def test_an_attempt_without_any_row_loses_what_it_did() -> None:
    events = [event("started", 0, step=0), event("restarting", 7, step=3), event("started", 9, step=0)]
    found = measure([row(1, 11), row(2, 12)], events)
    assert (found.lost_steps, found.restarts, found.step_seconds) == (3, 1, 2.0)
    assert found.down_seconds == pytest.approx(9.0)


def test_a_rollback_loses_steps_and_is_no_restart() -> None:
    rows = [*(row(step, step) for step in range(1, 8)), row(5, 9, resumed_from=4), row(6, 10)]
    found = measure(rows, [event("started", 0, step=0), event("rollback", 7.5, step=7, to_step=4)])
    assert (found.restarts, found.rollbacks, found.lost_steps, found.step_seconds) == (0, 1, 3, 6.0)
    assert "3 lost steps, 1 rollback" in str(found)


def test_changes_of_size_and_slow_ranks_are_counted() -> None:
    events = [
        event("started", 0, step=0),
        event("straggler", 3, rank=1, step=3),
        event("resized", 5, from_workers=4, to_workers=2, step=4),
        event("started", 6, step=4),
    ]
    found = measure([row(1, 1), row(5, 9, resumed_from=4)], events)
    assert (found.resizes, found.stragglers, found.restarts) == (1, 1, 1)
    assert "1 restart" in str(found) and "1 change of size, 1 slow rank" in str(found)


def test_a_run_of_another_runs_checkpoint_begins_at_its_step() -> None:
    found = measure([row(101, 2, resumed_from=100), row(102, 3)], [event("started", 0, step=100)])
    assert (found.step_seconds, found.lost_steps) == (2.0, 0)


def test_without_events_the_first_step_is_the_start() -> None:
    found = measure([row(1, 5, 3.0), row(2, 6), row(2, 8), row(3, 9)], [])
    assert found.wall_seconds == pytest.approx(7.0)
    assert (found.step_seconds, found.lost_steps) == (5.0, 1), "rows of old files do not say that they go back"


def test_nothing_recorded_has_no_ratio(tmp_path: Path) -> None:
    assert measure([], [event("started", 0, step=0)]).ratio is None
    assert run_efficiency(tmp_path).ratio is None
    assert "unknown" in str(measure([{"step": 1, "loss": 1.0}], []))


def test_a_run_folder_is_read(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in KILLED_ROWS))
    (tmp_path / "audit.jsonl").write_text("".join(json.dumps(event) + "\n" for event in KILLED))
    assert run_efficiency(tmp_path) == measure(KILLED_ROWS, KILLED)
    assert event_time(KILLED[1]) == START + 15


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=1, max_size=6))
def test_each_second_is_counted_once(attempts: list[tuple[int, int]]) -> None:
    """Attempts of some steps of a second each, from a step at most as far as the last one got, one after the other."""
    rows: list[dict[str, Any]] = []
    events: list[dict[str, Any]] = []
    now, reached = 0.0, 0
    for steps, back in attempts:
        start = max(0, reached - back)
        events.append(event("started", now, step=start))
        for step in range(start + 1, start + steps + 1):
            now += 1.0
            rows.append(row(step, now, **({"resumed_from": start} if step == start + 1 else {})))
        reached, now = start + steps, now + 0.5
    found = measure(rows, events)
    assert found.step_seconds == reached
    assert found.lost_steps == found.lost_seconds == len(rows) - reached
    assert found.down_seconds == pytest.approx(0.5 * (len(attempts) - 1))
    assert found.other_seconds == pytest.approx(0.0, abs=1e-3)
