"""Lists and evaluation sets as files: what is in them, and errors with their place."""

import json
from pathlib import Path

import pytest

from data_pipelines.steps.lists import iter_texts, read_entries
from llmtrain.errors import ConfigError, DataError, PathError


def entries(*files: Path) -> list[str]:
    return read_entries([str(file) for file in files], lambda line: "" if " " in line else line.lower(), "a word")


def test_entries_of_all_files(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes("\ufeff# comment\n One \r\n\nTWO\n".encode())
    (tmp_path / "b").write_bytes("é".encode())
    assert entries(tmp_path / "a", tmp_path / "b") == ["one", "two", "é"]


@pytest.mark.parametrize(
    ("content", "error", "says"),
    [
        (b"one\ntwo words\n", DataError, "list:2: 'two words' is not a word. Correct the line, or put # before it."),
        (b"one\n\ntw\xffo\n", DataError, "list:3: is not UTF-8 text. Unpack the file if it is packed"),
        (b"# one\n\n", ConfigError, "list: has no entry. Each line must be a word."),
        (None, ConfigError, "list: no such file. Check the spelling."),
    ],
)
def test_what_is_wrong_with_a_list(tmp_path: Path, content: bytes | None, error: type, says: str) -> None:
    path = tmp_path / "list"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(error, match=r".") as caught:
        entries(path)
    assert str(caught.value).startswith(f"{tmp_path}/{says}")


def test_a_folder_is_no_list(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"directory|regular file") as caught:
        entries(tmp_path)
    assert str(tmp_path) in str(PathError.of(caught.value))


SET = [
    {"question": "What?", "choices": ["a", "b"], "answer": 1, "more": {"question": "And?", "note": "n"}},
    {"question": "Why?", "hint": None},
]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ((), ["What?", "a", "b", "And?", "n", "Why?"]),
        (("question",), ["What?", "And?", "Why?"]),
        (("choices", "note"), ["a", "b", "n"]),
        (("more",), ["And?", "n"]),
    ],
)
def test_texts_of_json_by_their_keys(tmp_path: Path, fields: tuple[str, ...], expected: list[str]) -> None:
    (tmp_path / "set.json").write_text(json.dumps(SET))
    (tmp_path / "set.JSONL").write_text("\n\n".join(map(json.dumps, SET)) + "\n")
    for name in ("set.json", "set.JSONL"):
        assert list(iter_texts(str(tmp_path / name), fields)) == expected


def test_texts_of_plain_text_are_paragraphs(tmp_path: Path) -> None:
    (tmp_path / "set.txt").write_text("one\ntwo\n\n \n three\r\n\r\nfour")
    assert [" ".join(text.split()) for text in iter_texts(str(tmp_path / "set.txt"), ("ignored",))] == [
        "one two",
        "three",
        "four",
    ]


@pytest.mark.parametrize(
    ("name", "content", "error", "says"),
    [
        ("set.jsonl", '{"a": "b"}\n{"a": \n', DataError, "set.jsonl:2: not JSON ("),
        ("set.json", "[" * 100_000, DataError, "set.json: not JSON (lists or objects are nested more than 32 deep)"),
        ("set.json", '[{"a": 1}]', ConfigError, "set.json: has no text."),
        ("set.json", '[{"a": "b"}]', ConfigError, "set.json: has no text under the keys question."),
        ("set.txt", " \n", ConfigError, "set.txt: has no text"),
    ],
)
def test_what_is_wrong_with_a_set(tmp_path: Path, name: str, content: str, error: type, says: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(error, match=r".") as caught:
        list(iter_texts(str(tmp_path / name), ("question",) if "question" in says else ()))
    assert str(caught.value).startswith(f"{tmp_path}/{says}")
