"""What every reader does where a file is spoiled: it ends with 3 (or 2) and names the file, or nothing rests on it."""

import hashlib
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.hostile.command import Ending, Server, remove
from tests.hostile.good_things import make_good_things
from tests.hostile.spoiled_files import ABSENT, COMMANDS, CONTRADICTIONS, KINDS, MORE, TABLE
from tests.support.hf_folders import write_llama

ANSWERS = {"checkpoint diff": 1}
"""Exit codes other than 0 that are an answer."""

CELLS = [(file, kind) for file in TABLE for kind in KINDS]
"""`make test` runs one kind of damage for each file, `make test-all` all of them."""


def in_turn(file: str, kind: str) -> bool:
    return (list(TABLE).index(file) - list(KINDS).index(kind)) % len(KINDS) == 0


@pytest.fixture(scope="module")
def good(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a checkpoint, its export, and an import with a data set of its own tokenizer."""
    folder = tmp_path_factory.mktemp("good")
    make_good_things(server, folder)
    write_llama(folder / "hf2")
    (folder / "more.yaml").write_text(MORE)
    for words in (
        ("export", "runs/tiny", "model"),
        ("import", "hf2", "imported"),
        ("data", "shards", "texts", "jdata", "--tokenizer", "imported/tokenizer.json", "--valid-fraction", "0.3"),
    ):
        ending = server.run(words, folder, cpu_seconds=60, more_bytes=4_000_000_000)
        assert ending.code == 0, ending.output
    (folder / "output.txt").unlink()
    return folder


class Results:
    """What commands say and make of whole files, each run once."""

    def __init__(self, server: Server, good: Path) -> None:
        self._server, self._good = server, good
        self._known: dict[str, tuple[Ending, str]] = {}

    def of(self, command: str, place: Path, spoiled: str = "", kind: str = "") -> tuple[Ending, str]:
        """How a command ends in a copy of the good folder, and a hash of what it has made."""
        shutil.copytree(self._good, place, symlinks=True)
        try:
            if spoiled:
                spoil(place / spoiled, kind, ABSENT.get(spoiled))
            ending = self._server.run(COMMANDS[command], place)
            return ending, made(command, place, ending.output)
        finally:
            remove(place)

    def whole(self, command: str, place: Path) -> tuple[Ending, str]:
        if command not in self._known:
            self._known[command] = self.of(command, place)
            ending = self._known[command][0]
            assert ending.code == ANSWERS.get(command, 0), ending.output
        return self._known[command]


@pytest.fixture(scope="module")
def results(server: Server, good: Path) -> Results:
    return Results(server, good)


def spoil(path: Path, kind: str, absent: bytes | None) -> None:
    if absent is not None:
        path.write_bytes(absent)
    KINDS[kind](path)


def made(command: str, place: Path, output: str) -> str:
    """The files that a command has written, or for one that only tells, what it says; times aside."""
    if COMMANDS[command][0] == "train" and "--dry-run" not in COMMANDS[command]:
        files = [*place.glob("runs/*/checkpoints/*/rank-*"), *place.glob("runs/*/tokenizer*")]
    elif COMMANDS[command][0] in ("export", "import"):
        files = [path for path in place.glob("out/**/*") if path.suffix in (".safetensors", ".json", ".model")]
        files = [path for path in files if path.name != "manifest.json"]  # it has the versions of packages in it
    elif command == "report":
        page = place / "runs/tiny/report.html"
        return re.sub(r"[\d.,:]+", "#", page.read_text()) if page.exists() else ""
    elif command == "data index":
        files = sorted(place.glob("data/train/*"))
    else:
        return re.sub(r"\d[\d:.,KM+-]*", "#", output)
    files = [path for path in files if path.is_file()]
    return str(sorted((str(path.relative_to(place)), hashlib.sha256(path.read_bytes()).hexdigest()) for path in files))


def outcome(ending: Ending, result: str, whole: tuple[Ending, str], file: str, expected_code: int) -> str:
    """The letter of the table; with `!` what no table may hold."""
    name = Path(file).name
    if "Traceback" in ending.output or ending.code < 0:
        return "!"
    named = max(ending.output.count(text) - whole[0].output.count(text) for text in (file, name)) > 0
    if ending.code != expected_code:
        return str(ending.code) if named or name in ending.output.partition("error:")[2] else f"{ending.code}!"
    return "s" if named else "=" if result == whole[1] else "-"


@pytest.mark.parametrize(
    ("file", "kind"),
    [pytest.param(*cell, marks=[] if in_turn(*cell) else [pytest.mark.whole_grid]) for cell in CELLS],
)
def test_a_spoiled_file(file: str, kind: str, results: Results, tmp_path: Path) -> None:
    expected = {command: row[list(KINDS).index(kind)] for command, row in TABLE[file].items()}
    actual, said = {}, {}
    for command in expected:
        whole = results.whole(command, tmp_path / "whole")
        ending, result = results.of(command, tmp_path / "case", file, kind)
        actual[command] = outcome(ending, result, whole, file, ANSWERS.get(command, 0))
        said[command] = ending.output[-1500:]
    wrong = {command: said[command] for command, letter in expected.items() if actual[command] != letter}
    assert actual == expected, wrong


@pytest.mark.parametrize("case", CONTRADICTIONS, ids=lambda case: case[0])
def test_whole_files_that_contradict_each_other(
    case: tuple[str, Callable[[Path], object], tuple[str, ...], str, str], server: Server, good: Path, tmp_path: Path
) -> None:
    _, put, words, code, said = case
    place = tmp_path / "case"
    shutil.copytree(good, place, symlinks=True)
    put(place)
    ending = server.run(words, place)
    remove(place)
    assert str(ending.code) == code, ending.output
    assert said in ending.output
