import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmtrain.errors import DataError
from llmtrain.runs.metrics_file import JsonlTracker, iter_rows, read_rows


def write(path: Path, steps: range, resume_step: int = 0, attempt: int = 1) -> None:
    tracker = JsonlTracker(path, resume_step)
    for step in steps:
        tracker.log({"step": step, "loss": float(step), "attempt": attempt})
    tracker.close("done")


def shown(path: Path) -> list[tuple[int, int]]:
    return [(row["step"], row["attempt"]) for row in read_rows(path)]


@given(value=st.floats(allow_nan=True, allow_infinity=True))
def test_every_float_survives_exactly_and_the_file_is_strict_json(tmp_path_factory, value: float):
    path = tmp_path_factory.mktemp("run") / "metrics.jsonl"
    tracker = JsonlTracker(path)
    tracker.log({"step": 1, "loss": value})
    tracker.close("done")

    def refuse(name: str):
        raise AssertionError(f"{name} is no JSON")

    json.loads(path.read_text(), parse_constant=refuse)
    (row,) = read_rows(path)
    assert row["loss"] == value or (math.isnan(row["loss"]) and math.isnan(value))


def test_rows_of_a_longer_first_attempt_are_superseded(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 28))
    write(path, range(21, 25), resume_step=20, attempt=2)
    assert shown(path) == [(step, 1) for step in range(1, 21)] + [(step, 2) for step in range(21, 25)]
    assert len(list(iter_rows(path))) == 27 + 4, "nothing is removed from the file"


def test_a_resume_that_logs_more_rarely_leaves_no_stale_rows(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 28))
    write(path, range(30, 31), resume_step=20, attempt=2)
    assert shown(path)[-2:] == [(20, 1), (30, 2)]


def test_a_start_from_scratch_in_a_used_file_replaces_everything(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 8))
    write(path, range(1, 3), resume_step=0, attempt=2)
    assert shown(path) == [(1, 2), (2, 2)]


def test_without_the_key_the_last_row_of_a_step_wins(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    rows = [
        {"step": 1, "loss": 3.0},
        {"step": 2, "loss": 2.0},
        {"step": 2, "valid_loss": 2.5},
        {"step": 2, "loss": 1.5},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_rows(path) == [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 1.5}]


def test_a_training_and_an_evaluation_row_of_one_step_both_count(tmp_path: Path):
    tracker = JsonlTracker(tmp_path / "metrics.jsonl")
    tracker.log({"step": 2, "loss": 2.0})
    tracker.log({"step": 2, "valid_loss": 2.5})
    tracker.flush()
    assert len(read_rows(tmp_path / "metrics.jsonl")) == 2


@pytest.mark.parametrize("torn", [b'{"step": 4, "lo', b"\0" * 200_000])
def test_a_torn_last_line_is_cut_and_nothing_else(tmp_path: Path, torn: bytes):
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 4))
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    assert [row["step"] for row in read_rows(path)] == [1, 2, 3]
    JsonlTracker(path, 3).close("done")
    assert path.read_bytes() == whole


def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 1.0}\n{"step": \n{"step": 3, "loss": 1.0}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl:2"):
        read_rows(path)


def test_a_full_disk_leaves_whole_rows_and_recording_goes_on_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tracker = JsonlTracker(tmp_path / "metrics.jsonl")
    tracker.log({"step": 1, "loss": 1.0})
    file = tracker._file

    class FullDisk:
        name = file.name
        truncate, seek = file.truncate, file.seek

        def write(self, line: bytes) -> int:
            return file.write(line[:7])

    monkeypatch.setattr(tracker, "_file", FullDisk())
    with pytest.raises(OSError, match="wrote 7 of"):
        tracker.log({"step": 2, "loss": 1.0})
    monkeypatch.setattr(tracker, "_file", file)
    tracker.log({"step": 3, "loss": 1.0})
    tracker.close("done")
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1, 3]
