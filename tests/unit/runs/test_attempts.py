"""Attempts are counted on the disk, so that each has a number and an id of its own."""

from pathlib import Path

from llmtrain.runs.audit import AUDIT_FILE, STARTED, StartedAttempt, begin_attempt, iter_events, record


def test_every_start_counts_whoever_starts_it(tmp_path: Path) -> None:
    first = begin_attempt(tmp_path, 0, 4)
    record(tmp_path, "restarting", rank=1)
    second = begin_attempt(tmp_path, 10, 2)
    assert first == StartedAttempt(1, first.run_id, 0)
    assert second == StartedAttempt(2, first.run_id, 10)
    events = [(event["number"], event["step"], event["workers"]) for event in iter_events(tmp_path, STARTED)]
    assert events == [(1, 0, 4), (2, 10, 2)]


def test_another_folder_is_another_run(tmp_path: Path) -> None:
    ids = set()
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        ids.add(begin_attempt(tmp_path / name, 0, 1).run_id)
    assert len(ids) == 2


def test_starts_that_were_recorded_without_an_id_count(tmp_path: Path) -> None:
    record(tmp_path, STARTED, step=0, workers=1)
    attempt = begin_attempt(tmp_path, 5, 1)
    assert attempt.number == 2
    assert begin_attempt(tmp_path, 6, 1) == StartedAttempt(3, attempt.run_id, 6)


def test_a_disk_that_takes_no_line_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / AUDIT_FILE).symlink_to(tmp_path / "absent" / "file")
    assert begin_attempt(tmp_path, 0, 1).number == 1
