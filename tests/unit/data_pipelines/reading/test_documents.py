import bz2
import gzip
import json
import lzma
import os
import sys
from pathlib import Path

import pytest

from data_pipelines.reading.documents import iter_documents
from data_pipelines.reading.inputs import ReadReport
from data_pipelines.reading.records import ReadOptions
from llmtrain.errors import ConfigError, DataError


def read(*inputs: object, field: str = "text", separator: str | None = None) -> tuple[list[str], ReadReport]:
    report = ReadReport()
    return list(iter_documents([str(name) for name in inputs], report, ReadOptions(field, separator))), report


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
    assert (report.files, report.documents, dict(report.left_out)) == (6, 5, {"empty": 1, "not_text": 1})
    assert report.examples["not_text"] == [str(tmp_path / "b" / "picture.png")]
    assert "1 that are not UTF-8 text" in report.summary() and "picture.png" in report.summary()
    assert report.text_bytes == sum(len(document.encode()) for document in documents)


def test_a_summary_names_two_examples_at_most(tmp_path: Path) -> None:
    for number in range(4):
        (tmp_path / f"module-{number}.pyc").write_bytes(b"\xff")
    (tmp_path / "a.txt").write_text("text")
    summary = read(tmp_path)[1].summary()
    assert "left out 4 " in summary and summary.count(".pyc") == 2


def test_inputs_keep_their_order_and_patterns_are_sorted(tmp_path: Path) -> None:
    for name in ("c.txt", "a.txt", "b.txt"):
        (tmp_path / name).write_text(name)
    assert read(tmp_path / "c.txt", tmp_path / "[ab].txt")[0] == ["c.txt", "a.txt", "b.txt"]


def test_links_to_folders_above_do_not_loop(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "loop").symlink_to(tmp_path)
    documents, report = read(tmp_path)
    assert documents == ["a"]
    assert report.left_out == {"repeated": 1} and report.examples["repeated"] == [str(tmp_path / "loop")]


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
    assert report.examples == {"not_text": [f"{path}:1", f"{path}:2"]}


LINES = '{"text": "one"}\n{"text": "zwei\\nZeilen"}\n'
TWO = ["one", "zwei\nZeilen"]
TEXTS: dict[str, tuple[str, list[str]]] = {
    "a.txt": ("plain\n", ["plain\n"]),
    "a.TXT": ("plain", ["plain"]),
    "README": ("# plain", ["# plain"]),
    "page.md": ('{"text": "not taken apart"}', ['{"text": "not taken apart"}']),
    "a.jsonl": (LINES, TWO),
    "A.JSONL": (LINES, TWO),
    "a.ndjson": (LINES, TWO),
    "a.v2.NdJson": (LINES, TWO),
    "one.json": ('{"id": 1, "text": "alone"}', ["alone"]),
    "one.JSON": ('{\n "text": "alone"\n}\n', ["alone"]),
    "list.json": ('[{"text": "a"},\n {"text": "b", "x": [1]}]', ["a", "b"]),
    "lines.json": (LINES, TWO),
}
"""What a file of a name holds, and the documents in it."""


def packed(content: bytes, ending: str) -> bytes:
    if ending == ".zst":
        return pytest.importorskip("backports.zstd").compress(content)
    return {"": bytes, ".gz": gzip.compress, ".BZ2": bz2.compress, ".xz": lzma.compress}[ending](content)


@pytest.mark.parametrize("ending", ["", ".gz", ".BZ2", ".xz", ".zst"])
@pytest.mark.parametrize("name", TEXTS)
def test_the_name_says_how_a_file_is_read(tmp_path: Path, name: str, ending: str) -> None:
    """Alone, in a folder and by a pattern; compressed or not; in capitals or not."""
    content, expected = TEXTS[name]
    path = tmp_path / "texts" / f"{name}{ending}"
    path.parent.mkdir()
    path.write_bytes(packed(content.encode(), ending))
    for given in (path, path.parent, tmp_path / "*" / "*"):
        documents, report = read(given)
        assert documents == expected
        assert not report.left_out


@pytest.mark.parametrize(
    "content", ['{"scripts": {}}', "[]", "[1, 2]", '[{"text": "a"}, {"b": 1}]', "{", "3", LINES + "{"]
)
def test_json_that_holds_no_texts_is_never_a_document(tmp_path: Path, content: str) -> None:
    """In a folder of code it is left out and said; where it was named, it is refused with what to do."""
    (tmp_path / "a.py").write_text("code")
    path = tmp_path / "package.json"
    path.write_text(content)
    if content.startswith(LINES):
        with pytest.raises(DataError, match=r"package\.json:3: not JSON"):
            read(tmp_path)
        return
    documents, report = read(tmp_path)
    assert documents == ["code"]
    assert "left out 1 of JSON without text under the key that --field names, such as" in report.summary()
    for named in (path, tmp_path / "*.json"):
        with pytest.raises(DataError, match=r"package\.json: .*--field names it.*Name it \.jsonl"):
            read(named)


def test_archives_are_never_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    for name in ("b.zip", "c.tgz", "d.npy", "e.parquet.gz"):
        (tmp_path / name).write_bytes(b"PK\3\4")
    documents, report = read(tmp_path)
    assert documents == ["text"] and report.left_out == {"archive": 4}
    for name in ("b.zip", "c.tgz", "d.npy", "e.parquet.gz"):
        with pytest.raises(ConfigError, match=f"{name}: is an archive"):
            read(tmp_path / name)


@pytest.mark.parametrize("ending", [".gz", ".BZ2", ".xz", ".zst"])
def test_what_cannot_be_unpacked_is_named(tmp_path: Path, ending: str) -> None:
    whole = packed(b"text " * 5000, ending)
    for content in (whole[: len(whole) // 2], b"no such thing", whole[:9] + b"\xff\xff\xff" + whole[12:]):
        path = tmp_path / f"a.txt{ending}"
        path.write_bytes(content)
        with pytest.raises(DataError, match=rf"a\.txt{ending}: cannot be (unpacked|read)"):
            read(path)


def test_zstd_without_its_package_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "backports", None)
    (tmp_path / "a.txt.zst").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"backports-zstd.*zstd -d"):
        read(tmp_path)


def test_inputs_without_text_are_told_with_the_reasons(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"\xff")
    (tmp_path / ".hidden").write_text("secret")
    with pytest.raises(ConfigError, match=r"no text in it: read 0 documents .*1 that are not UTF-8 .*1 hidden"):
        read(tmp_path)


def test_hidden_files_and_folders_are_no_training_data(tmp_path: Path) -> None:
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text("url = https://user:password@host")
    (tmp_path / ".env").write_text("KEY=secret")
    (tmp_path / "a.txt").write_text("a")
    documents, report = read(tmp_path)
    assert documents == ["a"]
    assert "left out 2 hidden, such as" in report.summary() and ".git" in report.summary()
    assert read(tmp_path / "**" / "*")[0] == ["a"]
    assert read(tmp_path / ".env")[0] == ["KEY=secret"]  # unless they are what was asked for
    assert read(tmp_path / ".git")[0] == ["url = https://user:password@host"]


def test_links_are_followed_and_each_file_counts_once(tmp_path: Path) -> None:
    """By whatever way: linked folders and files, hard links, other spellings, a pattern beside a folder."""
    (tmp_path / "far" / "deep").mkdir(parents=True)
    (tmp_path / "far" / "deep" / "x.txt").write_text("x")
    (tmp_path / "in" / "sub").mkdir(parents=True)
    (tmp_path / "in" / "sub" / "y.txt").write_text("y")
    (tmp_path / "in" / "a-link").symlink_to(tmp_path / "far")
    (tmp_path / "in" / "again").symlink_to(tmp_path / "in" / "sub")
    (tmp_path / "in" / "sub" / "up").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "0-link.txt").symlink_to(tmp_path / "in" / "z.txt")
    (tmp_path / "in" / "z.txt").write_text("z")
    (tmp_path / "in" / "hard.txt").hardlink_to(tmp_path / "in" / "z.txt")
    (tmp_path / "in" / "gone").symlink_to(tmp_path / "nowhere")
    (tmp_path / "in" / "round").symlink_to(tmp_path / "in" / "round")
    os.mkfifo(tmp_path / "in" / "pipe")
    documents, report = read(tmp_path / "in")
    assert documents == ["x", "z", "y"]
    assert report.left_out == {"repeated": 4, "not_file": 3}
    again, report = read(tmp_path / "in", tmp_path / "in" / "*.txt", tmp_path / "in" / "sub" / ".." / "z.txt")
    assert again == documents
    assert report.left_out["repeated"] == 4 + 3 + 1
    assert "that had been read under another name or input" in report.summary()
    with pytest.raises(ConfigError, match="is not a file but a pipe"):
        read(tmp_path / "in" / "pipe")


def test_a_pattern_means_what_the_shell_makes_of_it(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "x.txt").write_text("x")
    (tmp_path / "z.txt").write_text("z")
    assert read(tmp_path / "*")[0] == read(tmp_path / "a", tmp_path / "z.txt")[0] == ["x", "z"]


def test_a_separator_cuts_a_text_file_into_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "all.txt"
    path.write_bytes("\ufeffone\n<|end|>\nzw\u00f6lf<|end|><|end|> three\r\n".encode())
    (tmp_path / "lines.jsonl").write_text('{"text": "kept <|end|> whole"}\n')
    expected = ["one\n", "\nzw\u00f6lf", " three\r\n"]
    for block_bytes in (1 << 20, 1, 2, 3, 7):
        monkeypatch.setattr("data_pipelines.reading.opened.BLOCK_BYTES", block_bytes)
        documents, report = read(path, separator="<|end|>")
        assert (documents, report.left_out) == (expected, {"empty": 1})
    assert read(tmp_path, separator="<|end|>")[0] == [*expected, "kept <|end|> whole"]
    monkeypatch.setattr("data_pipelines.reading.opened.BLOCK_BYTES", 14)
    path.write_bytes(b"one<|end|>two\n\xff")
    with pytest.raises(DataError, match="not UTF-8 text behind its part 1"):
        read(path, separator="<|end|>")
    path.write_bytes(b"\xff")
    assert read(tmp_path, separator="<|end|>")[1].left_out == {"not_text": 1}


def test_a_folder_that_cannot_be_listed_is_no_empty_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "closed").mkdir()

    def scandir(folder: Path) -> object:
        if folder.name == "closed":
            raise PermissionError(13, "Permission denied")
        return real(folder)

    real = os.scandir
    monkeypatch.setattr("data_pipelines.reading.inputs.os.scandir", scandir)
    with pytest.raises(DataError, match="closed: cannot be listed"):
        read(tmp_path)
