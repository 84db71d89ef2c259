"""Logs of ranks: every line once, in order, whatever is appended, torn, replaced or new."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmtrain.cli import main
from llmtrain.runs.folder import RunFolder
from llmtrain.runs.rank_logs import Follower, Line, log_path, rank_files, written_lines
from llmtrain.runs.status import Status


def write(run: Path, rank: int, text: str | bytes) -> None:
    path = log_path(run, rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        file.write(text if isinstance(text, bytes) else text.encode())


def head(minute: int, rank: int) -> str:
    return f"=== 2026-01-01T00:{minute:02d}:00+00:00 rank {rank} of 2 on n1, process 7\n"


def texts(lines: object) -> list[tuple[int, str]]:
    assert isinstance(lines, list)
    return [(line.rank, line.text) for line in lines]


def test_attempts_are_in_order_of_time_and_ranks_in_each_of_them(tmp_path: Path) -> None:
    for rank in (1, 0):
        for attempt in (1, 2):
            write(tmp_path, rank, head(attempt, rank) + f"rank {rank} attempt {attempt}\n")
    write(tmp_path, 10, head(2, 10) + "a rank that the first attempt did not have\n")
    (tmp_path / "logs" / "stacks.txt").write_text("not a rank's log")
    lines = [line for line in written_lines(rank_files(tmp_path)) if not line.text.startswith("===")]
    assert texts(lines) == [
        (0, "rank 0 attempt 1"),
        (1, "rank 1 attempt 1"),
        (0, "rank 0 attempt 2"),
        (1, "rank 1 attempt 2"),
        (10, "a rank that the first attempt did not have"),
    ]


def test_the_last_lines_of_each_rank(tmp_path: Path) -> None:
    for rank in (0, 1):
        write(tmp_path, rank, head(1, rank) + "".join(f"{number}\n" for number in range(50)))
    assert texts(list(written_lines(rank_files(tmp_path), 2))) == [(0, "48"), (0, "49"), (1, "48"), (1, "49")]
    assert list(written_lines(rank_files(tmp_path), 0)) == []


def test_torn_characters_and_lines_are_survived(tmp_path: Path) -> None:
    write(tmp_path, 0, "grün\n".encode()[:-3] + b"\n\xff\xfe\ntorn \xe2\x82")
    assert texts(list(written_lines(rank_files(tmp_path)))) == [(0, "gr�"), (0, "��"), (0, "torn �")]


def test_following(tmp_path: Path) -> None:
    write(tmp_path, 0, "old\nhal")
    follower = Follower(lambda: rank_files(tmp_path))
    ends = follower.skip_written()
    assert texts(list(written_lines(rank_files(tmp_path), None, ends))) == [(0, "old")]
    assert list(follower.new_lines()) == []
    write(tmp_path, 0, "f a line\nand \xe2\x82".encode("latin-1"))
    write(tmp_path, 1, "a new rank\n")
    assert texts(list(follower.new_lines())) == [(0, "half a line"), (1, "a new rank")]
    write(tmp_path, 0, b"\xac\n")
    assert texts(list(follower.new_lines())) == [(0, "and €")], "a character that came in two parts is whole"
    log_path(tmp_path, 0).write_text("new\n")
    assert texts(list(follower.new_lines())) == [(0, "new")], "a log that was replaced is read from its start"
    write(tmp_path, 1, "killed while wri")
    assert list(follower.new_lines()) == []
    assert list(follower.unfinished_lines()) == [Line(1, "killed while wri")]
    assert list(follower.unfinished_lines()) == []


@given(st.text(st.characters(exclude_characters="\n\r", exclude_categories=["Cs"])).map(lambda text: f"{text}\n"))
def test_a_log_in_pieces_is_the_log(tmp_path_factory: pytest.TempPathFactory, line: str) -> None:
    run = tmp_path_factory.mktemp("run")
    write(run, 0, "")
    follower = Follower(lambda: rank_files(run))
    found: list[Line] = []
    for byte in line.encode():
        write(run, 0, bytes([byte]))
        found += follower.new_lines()
    assert [each.text + "\n" for each in found] == [line]


def make_run(run: Path, status: Status = "done") -> Path:
    with RunFolder(run) as folder:
        folder.write_status(status, 5, 5)
    return run


def logs(*arguments: str | Path) -> int:
    try:
        main(["logs", *map(str, arguments)])
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run")
    write(run, 0, "zero\n")
    write(run, 1, "one\n")
    assert logs(run) == 0
    assert capsys.readouterr().out == " 0 | zero\n 1 | one\n"
    assert logs(run, "--rank", "1") == 0
    assert capsys.readouterr().out == "one\n", "of one rank, the log as it is"


def test_what_is_not_there_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert logs(tmp_path) == 2
    assert "not a run folder" in capsys.readouterr().err
    run = make_run(tmp_path / "run")
    assert logs(run) == 2
    assert "no rank has written a log" in capsys.readouterr().err
    write(run, 0, "zero\n")
    assert logs(run, "--rank", "3") == 2
    assert "--rank 3" in (err := capsys.readouterr().err) and "Those that it has: 0." in err


def test_following_goes_on_over_a_requeue_and_ends_with_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "run", "preempted")
    write(run, 0, "".join(f"{number}\n" for number in range(20)))

    def requeued() -> None:
        write(run, 0, "again\n")
        write(run, 1, "new rank\n")

    def ended() -> None:
        make_run(run, "failed")
        write(run, 0, "last words, unfinished")

    happen = iter([lambda: None, requeued, ended])
    monkeypatch.setattr("llmtrain.cli.watching.time.sleep", lambda seconds: next(happen)())
    assert logs(run, "-f", "-n", "1") == 0
    written = capsys.readouterr()
    assert written.out.splitlines() == [" 0 | 19", " 0 | again", " 1 | new rank", " 0 | last words, unfinished"]
    assert written.err.splitlines() == [
        f"{run}: told to stop; waiting for its next start (Ctrl-C ends this)",
        f"{run}: failed",
    ]
