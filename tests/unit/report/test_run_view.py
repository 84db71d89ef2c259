"""What is told of a run from its folder: its state, and whether its process lives, however it has ended."""

import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.cli import main
from llmtrain.errors import ConfigError
from llmtrain.files import LINE_BYTES, sealed, unsealed
from llmtrain.report.run_view import RunView, find_runs, look
from llmtrain.runs.audit import record
from llmtrain.runs.folder import LEASE_SECONDS, LOCK, RunFolder
from llmtrain.runs.metrics_file import BLOCK_BYTES, NewestRows, newest_rows, rows_that_count
from llmtrain.runs.status import STATUS, Status


def write_rows(run: Path, first: int = 1, last: int = 40, age: float = 0.0, **cells: object) -> None:
    """Rows of 2 seconds a step, the last one so many seconds old."""
    with (run / "metrics.jsonl").open("a") as file:
        for step in range(first, last + 1):
            seconds = time.time() - age - 2.0 * (last - step)
            row = {"step": step, "time": seconds, "loss": 5.0, "step_seconds": 1.5, "tokens_per_second": 100.0}
            file.write(json.dumps({**row, **(cells if step == first else {})}) + "\n")


def evaluate(run: Path, step: int, loss: float, **cells: object) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": step, "time": time.time(), "valid_loss": loss, **cells}) + "\n")


def make_run(folder: Path, status: Status = "running", step: int = 40, cause: str = "") -> Path:
    """The folder of a run that a process wrote, and let go of."""
    with RunFolder(folder) as held:
        held.write_status(status, step, 100, "", cause)
    write_rows(folder)
    return folder


def dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def hold(run: Path, **owner: object) -> None:
    """A lock as another process has left it."""
    with RunFolder(run):
        lock = json.loads((run / LOCK).read_text())
    (run / LOCK).write_text(json.dumps({**lock, **owner}))


def rewrite_status(run: Path, **fields: object) -> None:
    status = unsealed(json.loads((run / STATUS).read_text()))
    (run / STATUS).write_text(json.dumps(sealed({**status, **fields})))


def test_a_running_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with RunFolder(run) as held:
        record(run, "started", step=0, workers=2)
        record(run, "restarting", rank=1, step=30)
        record(run, "started", step=20, workers=2)
        held.write_status("running", 39, 100, "training")
        write_rows(run)
        (run / "checkpoints" / "step-00000030").mkdir(parents=True)
        view = look(run)
    assert (view.state, view.alive, view.step, view.total_steps) == ("running", True, 40, 100)
    assert (view.loss, view.tokens_per_second, view.attempt) == (5.0, 100.0, 2)
    assert view.seconds_left == pytest.approx(60 * 2.0, rel=0.01), "with all that happens between steps"
    assert (view.pid, view.host, view.next_action) == (os.getpid(), socket.gethostname(), "wait")
    assert view.checkpoint == str(run / "checkpoints" / "step-00000030") and view.checkpoint_step == 30
    assert view.checkpoint_age_seconds is not None and view.checkpoint_age_seconds < 60
    datetime.fromisoformat(view.since)


@pytest.mark.parametrize("status", ["done", "preempted", "failed", "stalled"])
def test_a_run_that_has_ended(tmp_path: Path, status: Status) -> None:
    view = look(make_run(tmp_path / "run", status, cause="rank 1: no"))
    assert (view.state, view.alive, view.cause, view.seconds_left) == (status, None, "rank 1: no", None)
    assert view.next_action


def test_a_run_whose_process_was_killed(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    pid = dead_process()
    rewrite_status(run, pid=pid)
    (run / "checkpoints" / "step-00000030").mkdir(parents=True)
    for left in ("lock", "no lock"):
        if left == "lock":
            hold(run, pid=pid, process_started="1")
        else:
            (run / LOCK).unlink()
        view = look(run)
        assert (view.state, view.alive, view.seconds_left) == ("dead", False, None), left
        assert view.message == f"process {pid} on this host is gone, though the run was running"
        assert view.next_action == "start the same command again: it continues from step 30"


def test_a_process_id_that_another_process_has_now_is_not_taken_for_the_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    hold(run, pid=os.getpid(), process_started="1")
    assert look(run).state == "dead"


def test_a_run_on_another_host_lives_as_long_as_it_touches_its_lock(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    hold(run, host="elsewhere", machine="another boot")
    view = look(run)
    assert (view.state, view.alive, view.host) == ("running", True, "elsewhere")
    rewrite_status(run, host="elsewhere")
    old = time.time() - LEASE_SECONDS - 300
    os.utime(run / LOCK, (old, old))
    view = look(run)
    assert (view.state, view.alive) == ("dead", False)
    assert "on elsewhere has given no sign of life for 0:06:0" in view.message


def test_between_attempts_the_launcher_counts(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "restarting", cause="rank 0: killed")
    assert (look(run).state, look(run).alive) == ("restarting", True)
    rewrite_status(run, pid=dead_process())
    assert (look(run).state, look(run).alive) == ("dead", False)
    rewrite_status(run, host="elsewhere")
    assert (look(run).state, look(run).alive) == ("restarting", None)


def test_a_run_without_status(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with RunFolder(run):
        assert (look(run).state, look(run).alive) == ("starting", True)
    (run / "metrics.jsonl").touch()
    assert look(run).state == "unknown"


def test_rows_of_an_attempt_before_do_not_count(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with RunFolder(run) as held:
        write_rows(run, age=100.0)
        write_rows(run, 21, 24, resumed_from=20)
        held.write_status("running", 24, 100)
        assert look(run).step == 24
        assert [row["step"] for row in newest_rows(run / "metrics.jsonl", 100).training] == [21, 22, 23, 24]
        rewrite_status(run, step=0, updated=datetime.fromtimestamp(time.time() + 60, UTC).isoformat())
        assert look(run).step == 0, "a restart has gone back, and no row of it is there yet"


def test_the_validation_loss_outlives_restarts_and_many_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    with RunFolder(run) as held:
        held.write_status("running", 40, 100_000, "training")
        write_rows(run)
        evaluate(run, 40, 3.25)
        write_rows(run, 41, 50, resumed_from=40)
        assert look(run).valid_loss == 3.25, "evaluated before the restart"
        write_rows(run, 51, 20_000)
        assert (run / "metrics.jsonl").stat().st_size > 2 * BLOCK_BYTES
        assert look(run).valid_loss == 3.25, "evaluated long ago"
        assert "validation 3.2500" in status(capsys, run)[1]
        write_rows(run, 39, 45, resumed_from=38)
        assert look(run).valid_loss is None, "the run went back before its only evaluation"


def test_until_a_restart_has_made_a_step_the_rows_up_to_it_count(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with RunFolder(run) as held:
        write_rows(run, 1, 20)
        evaluate(run, 20, 4.0)
        write_rows(run, 21, 40, loss=9.0)
        evaluate(run, 40, 3.0)
        held.write_status("running", 20, 100, "starting")
        view = look(run)
        assert (view.step, view.loss, view.valid_loss) == (20, 5.0, 4.0)
        write_rows(run, 21, 22, resumed_from=20)
        held.write_status("running", 22, 100, "training")
        assert (look(run).step, look(run).valid_loss) == (22, 4.0)


def test_an_evaluation_right_after_a_restart_hides_no_training_loss(tmp_path: Path) -> None:
    """Training rows are written every so many steps: the first row of an attempt may be an evaluation."""
    run = tmp_path / "run"
    with RunFolder(run) as held:
        held.write_status("running", 40, 100, "training")
        write_rows(run)
        evaluate(run, 41, 3.25, resumed_from=40)
        view = look(run)
    assert (view.loss, view.valid_loss, view.tokens_per_second) == (5.0, 3.25, 100.0)
    assert view.last_row_age_seconds is not None


def test_a_row_of_many_columns_is_read_whole(tmp_path: Path) -> None:
    """The norms of many layers: one row is longer than what is read at once."""
    run = tmp_path / "run"
    with RunFolder(run) as held:
        held.write_status("running", 40, 100, "training")
        write_rows(run)
        evaluate(run, 40, 3.25)
        write_rows(run, 41, 41, **{f"norm/decoder.layers.{number}.weight": 1.5 for number in range(40_000)})
        view = look(run)
    assert (view.step, view.loss, view.valid_loss) == (41, 5.0, 3.25)


@given(data=st.data())
@settings(deadline=None, max_examples=200)
def test_the_newest_rows_are_those_that_count(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The slow reference reads the file from its begin. Attempts end anywhere, go back, and some say so."""
    file = tmp_path_factory.mktemp("rows") / "metrics.jsonl"
    rows, step = [], 0
    for attempt in range(data.draw(st.integers(1, 4))):
        first = True
        for _ in range(data.draw(st.integers(0, 12))):
            step += 1
            after = [("valid_loss",), ("task_seconds",), ("valid_loss", "task_seconds")]
            kinds = data.draw(st.sampled_from([("loss",), *(("loss", *kinds) for kinds in after), *after]))
            for kind in kinds:
                row = {"step": step, "time": 1.0, kind: float(len(rows)), "step_seconds": 1.0, "tokens_per_second": 1.0}
                if attempt and first:
                    row["resumed_from"] = step - 1
                first = False
                rows.append(row)
        step = data.draw(st.integers(0, step))
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    kept = rows_that_count(rows)
    found, with_tasks = newest_rows(file, 5), newest_rows(file, 5, tasks=True)
    tasks = [row for row in kept if "task_seconds" in row]
    assert with_tasks == NewestRows(with_tasks.training, found.evaluation, tasks[-1] if tasks else None)
    assert found.tasks is None
    evaluations = [row for row in kept if "valid_loss" in row]
    assert found.evaluation == (evaluations[-1] if evaluations else None)
    training = [row for row in kept if "loss" in row]
    assert found.training == training[len(training) - len(found.training) :]
    assert bool(found.training) == bool(training)


def test_rows_from_before_the_mark_of_a_restart(tmp_path: Path) -> None:
    """A step that is there twice replaces the first one, with its evaluation."""
    run = tmp_path / "run"
    with RunFolder(run) as held:
        held.write_status("running", 10, 100, "training")
        write_rows(run, 1, 4)
        evaluate(run, 4, 4.0)
        write_rows(run, 5, 10)
        evaluate(run, 10, 3.0)
        write_rows(run, 10, 10)
        assert look(run).valid_loss == 4.0
        assert [row["step"] for row in newest_rows(run / "metrics.jsonl", 100).training] == list(range(1, 11))


def test_torn_and_strange_rows_are_left_out(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    assert newest_rows(file, 100) == NewestRows()
    row = json.dumps({"step": 1, "loss": "NaN", "time": 1.0, "step_seconds": 1.0, "tokens_per_second": 1.0})
    file.write_bytes(b"\xff\xfe{\n" + row.encode() + b'\n[]\n{"step": 2, "lo')
    assert [row["step"] for row in newest_rows(file, 100).training] == [1]
    for strange in (b"x" * 100_000, b"y" * (BLOCK_BYTES + 5), b"z" * (LINE_BYTES + BLOCK_BYTES + 5)):
        file.write_bytes(row.encode() + b"\n" + strange + b"\n")
        assert [row["step"] for row in newest_rows(file, 100).training] == [1]
        file.write_bytes(row.encode() + b"\n" + strange)
        assert [row["step"] for row in newest_rows(file, 100).training] == [1], "it has no end yet"
        file.write_bytes(strange + b"\n" + row.encode() + b"\n")
        assert [row["step"] for row in newest_rows(file, 100).training] == [1]


def test_not_finite_numbers_are_unknown_ones(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "done")
    with (run / "metrics.jsonl").open("a") as file:
        cells = {"step": 41, "time": time.time(), "loss": "NaN", "step_seconds": 1.0, "tokens_per_second": 1.0}
        file.write(json.dumps(cells) + "\n")
    assert look(run).loss is None
    json.dumps(asdict(look(run)), allow_nan=False)


def test_runs_are_found_in_their_folder(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "runs" / name) for name in ("b", "a")]
    (tmp_path / "runs" / "notes").mkdir()
    assert find_runs(tmp_path / "runs") == sorted(runs)
    assert find_runs(runs[0]) == [runs[0]]
    for nothing in (tmp_path / "none", tmp_path / "runs" / "notes"):
        with pytest.raises(ConfigError, match="Give the folder of a run"):
            find_runs(nothing)


def status(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str]:
    with pytest.raises(SystemExit) as ended:
        main(["status", *map(str, arguments)])
    return int(ended.value.code or 0), capsys.readouterr().out


def test_the_command_tells_one_run_in_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run", "failed", cause="rank 1 on n1: ValueError: no")
    code, out = status(capsys, run)
    assert code == 0, "that a run has failed could be told"
    assert out.startswith("run: failed, step 40 of 100 (40%)\n")
    assert "  cause       rank 1 on n1: ValueError: no\n" in out
    assert "  next        mend the cause, then start the same command again" in out


def test_a_run_that_starts_again_says_so_and_tells_no_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A finished run that is extended stands at 91% until its first new step: the old rows say nothing of its pace."""
    run = tmp_path / "run"
    with RunFolder(run) as held:
        write_rows(run, age=1.0)
        held.write_status("running", 40, 44, "starting")
        assert look(run).seconds_left is None
        assert status(capsys, run)[1].startswith("run: running, step 40 of 44 (91%), no step since the start yet\n")
        write_rows(run, 41, 42)
        held.write_status("running", 42, 44, "training")
        assert look(run).seconds_left is not None
        assert "since the start" not in status(capsys, run)[1]


def test_a_finished_run_says_which_number_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    with RunFolder(run) as held:
        held.write_status("done", 40, 30)
    code, out = status(capsys, run)
    assert code == 0 and "%" not in out
    assert out.startswith("run: done, step 40, more than the 30 that were asked for last\n")
    assert "more than 40 steps go on" in out


def test_the_command_tells_several_runs_in_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "a", "failed", cause="line\nand line")
    make_run(tmp_path / "b", "done")
    make_run(tmp_path / "c")
    (tmp_path / "c" / STATUS).write_text("not json")
    code, out = status(capsys, tmp_path)
    head, *rows = [line.split("\t") for line in out.splitlines()]
    assert [row[:2] for row in rows] == [["a", "failed"], ["b", "done"], ["c", "damaged"]]
    assert [len(row) for row in rows] == [len(head)] * 3
    assert rows[0][-1] == "line and line"
    assert "is not a status that llmtrain wrote" in rows[2][-1]
    assert code == 3, "a file of one is damaged"


def test_the_command_prints_json_with_stable_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "a", "done")
    code, out = status(capsys, tmp_path / "a", "--json")
    (view,) = map(json.loads, out.splitlines())
    assert code == 0
    assert list(view) == list(RunView.__dataclass_fields__)
    assert (view["run"], view["state"], view["step"]) == ("a", "done", 40)


def test_watching_ends_once_all_runs_are_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that is gone is looked at twice: here it is replaced, and then the run ends."""
    run = make_run(tmp_path / "run")
    rewrite_status(run, pid=dead_process())
    endings = iter([lambda: rewrite_status(run, status="restarting", pid=os.getpid()), lambda: make_run(run, "done")])
    monkeypatch.setattr("llmtrain.report.run_view.time.sleep", lambda seconds: next(endings)())
    code, out = status(capsys, run, "--watch")
    assert code == 0
    assert [line.split(",")[0] for line in out.splitlines() if not line.startswith(" ")] == [
        "run: restarting",
        "run: done",
    ]


def test_watching_gives_up_on_a_dead_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "run")
    rewrite_status(run, pid=dead_process())
    monkeypatch.setattr("llmtrain.report.run_view.time.sleep", lambda seconds: None)
    code, out = status(capsys, run, "--watch", "--json")
    assert code == 0
    assert [json.loads(line)["state"] for line in out.splitlines()] == ["dead"]


def test_no_torch_is_imported() -> None:
    code = (
        "import sys\nfrom llmtrain.cli import main\n"
        "try: main(['status', '.'])\nexcept SystemExit as end: assert end.code == 2\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, capture_output=True)
