"""The audit log: events in order, durable line by line, and a torn line that spoils only itself."""

from pathlib import Path

import pytest

from llmtrain.errors import DataError
from llmtrain.runs.audit import AUDIT_FILE, iter_events, record


def test_events_come_back_in_order(tmp_path: Path) -> None:
    record(tmp_path, "restart", attempt=1)
    record(tmp_path, "rollback", to_step=4)
    record(tmp_path, "restart", attempt=2)
    assert [event["event"] for event in iter_events(tmp_path)] == ["restart", "rollback", "restart"]
    assert [event["attempt"] for event in iter_events(tmp_path, "restart")] == [1, 2]


def test_a_run_without_events_has_none(tmp_path: Path) -> None:
    assert list(iter_events(tmp_path)) == []


def test_a_torn_line_spoils_only_itself(tmp_path: Path) -> None:
    record(tmp_path, "restart", attempt=1)
    file = tmp_path / AUDIT_FILE
    file.write_bytes(file.read_bytes() + b'{"time": "2026-')
    record(tmp_path, "restart", attempt=2)
    assert [event["attempt"] for event in iter_events(tmp_path)] == [1, 2]


def test_what_is_no_event_is_refused_with_its_line(tmp_path: Path) -> None:
    record(tmp_path, "restart", attempt=1)
    with (tmp_path / AUDIT_FILE).open("a") as file:
        file.write('"a text"\n')
    with pytest.raises(DataError, match=r"audit\.jsonl:2: not an event"):
        list(iter_events(tmp_path))
