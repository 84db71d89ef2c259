import json
from pathlib import Path

import pytest

from data_pipelines.read import ReadReport, iter_documents
from llmtrain.errors import ConfigError, DataError


def read(*inputs: object, field: str = "text") -> tuple[list[str], ReadReport]:
    report = ReadReport()
    return list(iter_documents([str(name) for name in inputs], report, field)), report


def test_a_folder_is_read_whole_sorted_and_what_is_no_text_is_counted(tmp_path: Path) -> None:
    (tmp_path / "b" / "deep").mkdir(parents=True)
    (tmp_path / "z.txt").write_text("last")
    (tmp_path / "b" / "deep" / "x.py").write_bytes(b"one\r\ntwo\n")
    (tmp_path / "b" / "picture.png").write_bytes(b"\x89PNG\xff\xfe")
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbffirst")
    (tmp_path / "empty").touch()
    (tmp_path / "lines.jsonl").write_text('{"text": "l1"}\n\n{"text": "l2"}\n')
    documents, report = read(tmp_path)
    assert documents == ["first", "one\r\ntwo\n", "l1", "l2", "last"]
    assert (report.files, report.documents, report.empty, report.not_utf8) == (6, 5, 1, 1)
    assert report.examples == [str(tmp_path / "b" / "picture.png")]
    assert "1 that are not UTF-8 text" in report.summary() and "picture.png" in report.summary()
    assert report.text_bytes == sum(len(document.encode()) for document in documents)


def test_a_summary_names_two_examples_at_most(tmp_path: Path) -> None:
    for number in range(4):
        (tmp_path / f"module-{number}.pyc").write_bytes(b"\xff")
    summary = read(tmp_path)[1].summary()
    assert "left out 4 " in summary and summary.count(".pyc") == 2


def test_inputs_keep_their_order_and_patterns_are_sorted(tmp_path: Path) -> None:
    for name in ("c.txt", "a.txt", "b.txt"):
        (tmp_path / name).write_text(name)
    assert read(tmp_path / "c.txt", tmp_path / "[ab].txt")[0] == ["c.txt", "a.txt", "b.txt"]


def test_links_to_folders_above_do_not_loop(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "loop").symlink_to(tmp_path)
    assert read(tmp_path)[0] == ["a"]


def test_missing_input_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(ConfigError, match=r"none\.txt: no such file"):
        next(iter_documents([tmp_path / "a.txt", tmp_path / "none.txt"], ReadReport()))


def test_field_of_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"content": "é\u2028x", "text": "no"}) + "\n")
    assert read(path, field="content")[0] == ["é\u2028x"]


@pytest.mark.parametrize("line", ["{", '{"other": 1}', '{"text": 1}', "[1]", '"text"', "null"])
def test_broken_json_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(DataError, match=r"a\.jsonl:2: "):
        read(path)


def test_json_lines_that_are_no_unicode_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "\\ud800"}\n{"text": "\xff"}\n{"text": "fine"}\n')
    documents, report = read(path)
    assert documents == ["fine"]
    assert report.examples == [f"{path}:1", f"{path}:2"]
