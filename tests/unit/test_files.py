"""Only regular files are opened, nothing waits for a pipe's other end, and JSON has bounds."""

import json
import os
import socket
from contextlib import suppress
from pathlib import Path

import pytest

from llmtrain.files import (
    open_regular,
    parse_json,
    parse_line,
    read_bytes,
    read_json,
    read_text,
    replace_file,
    replace_folder,
    sealed_line,
    sealed_text,
    unsealed_text,
)


@pytest.fixture
def pipe(tmp_path: Path) -> Path:
    os.mkfifo(tmp_path / "pipe")
    return tmp_path / "pipe"


@pytest.mark.timeout(20)
@pytest.mark.parametrize("mode", ["rb", "ab", "ab+", "r+b", "wb"])
def test_a_pipe_is_refused_and_not_waited_for(pipe: Path, mode: str) -> None:
    with pytest.raises(OSError, match="a named pipe, not a regular file") as error:
        open_regular(pipe, mode)
    assert error.value.filename == str(pipe)


@pytest.mark.timeout(20)
def test_a_pipe_that_takes_the_place_of_a_file_is_not_waited_for(pipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    regular = pipe.with_name("regular")
    regular.write_bytes(b"")
    before = regular.stat()
    monkeypatch.setattr(Path, "stat", lambda path: before)
    with pytest.raises(OSError, match="a named pipe"):
        open_regular(pipe)


def test_other_kinds_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError, match="a folder"):
        open_regular(tmp_path)
    with pytest.raises(OSError, match="a device"):
        open_regular(Path("/dev/zero"))
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
        with pytest.raises(OSError, match="a socket"):
            open_regular(tmp_path / "socket")


def test_links_are_followed_to_regular_files_only(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    for name, target in (("good", "file"), ("dangling", "nothing"), ("loop", "loop"), ("zero", "/dev/zero")):
        (tmp_path / name).symlink_to(target)
    assert read_text(tmp_path / "good") == "text"
    for name in ("dangling", "loop", "zero"):
        for mode in ("rb", "ab"):
            with pytest.raises(OSError, match=name):
                open_regular(tmp_path / name, mode)
    assert not (tmp_path / "nothing").exists()


def test_a_path_that_cannot_be_is_an_os_error(tmp_path: Path) -> None:
    for path in (tmp_path / "a\0b", tmp_path / ("a" * 5000), tmp_path / "missing"):
        with pytest.raises(OSError):
            open_regular(path)


def test_files_are_made_and_appended_to(tmp_path: Path) -> None:
    for mode in ("wb", "ab"):
        with open_regular(tmp_path / "file", mode) as file:
            file.write(b"line\n")
    assert read_bytes(tmp_path / "file") == b"line\nline\n"


def test_a_file_beyond_its_limit_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    assert read_bytes(tmp_path / "file", 5) == b"12345"
    with pytest.raises(OSError, match="more than 4 bytes"):
        read_bytes(tmp_path / "file", 4)


@pytest.mark.parametrize("wrong", [b"", b"{", b"\xff", b"[" * 100_000, b'{"a":' * 50 + b"1" + b"}" * 50, b"1" * 5000])
def test_what_is_no_json_or_too_deep_is_a_value_error(tmp_path: Path, wrong: bytes) -> None:
    (tmp_path / "file").write_bytes(wrong)
    with pytest.raises(ValueError):
        read_json(tmp_path / "file")


def test_depth_counts_lists_and_objects() -> None:
    nested = json.dumps([{"a": [1, {}]}, "[[[["])
    assert parse_json(nested, depth=4) == json.loads(nested)
    with pytest.raises(ValueError, match="more than 3 deep"):
        parse_json(nested, depth=3)


EVENT = {"event": "rollback", "first": 100, "data": [{"at": -1.5e-05, "is": True}], "reason": "a {b} spike"}
EVENT = {"event": "rollback", "first": 100, "data": [{"at": -1.5e-05, "is": True}], "reason": "a {b} spike"}
LINE = sealed_line(EVENT)


def test_a_line_gives_back_what_was_sealed() -> None:
    assert parse_line(LINE) == EVENT
    assert parse_line(sealed_line({"steps": {10: "b", 9: "a"}})) == {"steps": {"10": "b", "9": "a"}}, "as it is read"
    assert parse_line(b'{"event": "of before"}\n') == {"event": "of before"}


def test_a_line_that_was_cut_is_none_wherever_it_was_cut() -> None:
    whole = len(LINE) - 1
    for kept in range(whole):
        if not LINE[:kept].endswith(b"}"):  # a crash would have to hit right there, in a text
            assert parse_line(LINE[:kept] + b"\n") is None, LINE[:kept]
    assert parse_line(LINE[:20] + bytes(100)) is None


@pytest.mark.parametrize("bit", range(8))
def test_a_changed_bit_never_gives_another_value(bit: int) -> None:
    """A change in the name of the seal, or from e to E, leaves the values as they were."""
    for at in range(len(LINE) - 1):
        changed = bytearray(LINE)
        changed[at] ^= 1 << bit
        with suppress(ValueError):
            found = parse_line(bytes(changed))
            assert found is not None, f"{bytes(changed)!r} was taken for one that was cut"
            assert {key: found[key] for key in EVENT} == EVENT


def test_a_file_is_put_in_place_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    os.mkfifo(path)
    replace_file(path, b"one")  # a pipe would have waited for a reader
    replace_file(path, b"other")
    assert path.read_bytes() == b"other"
    (tmp_path / "link").symlink_to("nowhere")
    replace_file(tmp_path / "link", b"content")
    assert not (tmp_path / "nowhere").exists() and not (tmp_path / "link").is_symlink()
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError) as raised:
        replace_file(tmp_path / "folder", b"content")
    assert raised.value.filename == str(tmp_path / "folder")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "folder", "link"], "nothing is left behind"


def test_a_sealed_text_is_the_text_below_its_first_line() -> None:
    sealed = sealed_text("name: a\nsteps: 10\n")
    assert unsealed_text(sealed) == unsealed_text("name: a\nsteps: 10\n") == "name: a\nsteps: 10\n"
    for damaged in (sealed.replace("10", "90"), sealed[:-3], sealed.replace(": a", ": b")):
        with pytest.raises(ValueError, match="sha256"):
            unsealed_text(damaged)


def folder_with(path: Path, text: str) -> Path:
    path.mkdir()
    (path / "file").write_text(text)
    return path


def test_a_folder_takes_the_place_of_another(tmp_path: Path) -> None:
    target, old = folder_with(tmp_path / "target", "before"), tmp_path / "old"
    replace_folder(folder_with(tmp_path / "new", "after"), target, old)
    assert ((target / "file").read_text(), (old / "file").read_text()) == ("after", "before")
    replace_folder(folder_with(tmp_path / "new", "first"), tmp_path / "other", tmp_path / "nothing")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old", "other", "target"]


@pytest.mark.parametrize("failing", ["rename", "sync"])
def test_where_a_folder_cannot_take_the_place_all_is_as_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    target, new = folder_with(tmp_path / "target", "before"), folder_with(tmp_path / "new", "after")
    rename = Path.rename

    def failed(path: Path, *other: Path) -> Path:
        if failing == "sync" or path == new:
            raise OSError(5, "Input/output error", str(path))
        return rename(path, *other)

    if failing == "sync":
        monkeypatch.setattr("llmtrain.files.sync_folder", failed)
    else:
        monkeypatch.setattr(Path, "rename", failed)
    with pytest.raises(OSError, match="Input/output error"):
        replace_folder(new, target, tmp_path / "old")
    assert ((target / "file").read_text(), (new / "file").read_text()) == ("before", "after")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "target"]
