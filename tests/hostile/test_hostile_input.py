"""Whatever is given to the command, it ends soon, in little memory, and says what is wrong: with 2 or 3, or with 0.

`make test-all` draws other cases in every run. A failure names its number: `HOSTILE_SEED=<number> make test-all` draws
the same ones again.
"""

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest

from tests.hostile.command import Case, Server, fault_of, judged
from tests.hostile.command_lines import command_cases
from tests.hostile.configurations import file_cases, override_cases, trained_cases
from tests.hostile.damaged_files import KINDS, READERS, STEP, damaged_cases, told_anew
from tests.hostile.good_things import make_good_things

AREAS: dict[str, tuple[Callable[[Random], Case], int, int]] = {
    "overrides": (override_cases, 24, 130),
    "run files": (file_cases, 16, 80),
    "trained values": (trained_cases, 12, 60),
    "command lines": (command_cases, 24, 130),
    "damaged files": (damaged_cases, 32, 200),
}
"""What draws a case, and how many of them are run in `make test` and in `make test-all`."""

BILLION = "\n".join(
    ["a0: &a0 [x, x, x, x, x, x, x, x, x]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9))]
)


def written(name: str, content: str | bytes) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        path = folder / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return spoil


def replaced(name: str, kind: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        KINDS[kind](folder / name)

    return spoil


def manifest_of_forty_digits(folder: Path) -> None:
    path = folder / "data/train/manifest.json"
    path.write_text(path.read_text().replace('"samples": ', '"samples": 1' + "0" * 40))


def changed(name: str, *keys: str, value: Any) -> Callable[[Path], None]:
    """A value in a JSON file, in a folder whose hashes are told anew."""

    def spoil(folder: Path) -> None:
        content = json.loads((folder / name).read_bytes())
        holder = content
        for key in keys[:-1]:
            holder = holder.setdefault(key, {})
        holder[keys[-1]] = value
        (folder / name).write_text(json.dumps(content))

    return spoil


def other_config(old: str, new: str) -> Callable[[Path], None]:
    """Another line in a checkpoint's configuration."""

    def spoil(folder: Path) -> None:
        path = folder / STEP / "config.yaml"
        before = path.read_text()
        assert old in before
        path.write_text(before.replace(old, new))
        told_anew(path)

    return spoil


def rows_without_rates(folder: Path) -> None:
    path = folder / "runs/tiny/metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({key: row[key] for key in row if "second" not in key}) + "\n" for row in rows))


SHARDS = ("data", "shards", "texts", "out", "--tokenizer", "tokenizer.model")
GENERATED = ("generate", "runs/tiny", "--prompt", "a", "--max-tokens", "2")
DRY, TRAINED = ("train", "run.yaml", "--dry-run"), ("train", "run.yaml", "name=other", "train.steps=2")
TOLD = frozenset({2, 3})
KNOWN = [
    Case("nested anchors", DRY, written("run.yaml", BILLION), TOLD),
    Case("brackets", (*DRY, "seed=" + "[" * 2000), None, TOLD),
    Case("5,000 digits", (*DRY, "seed=" + "9" * 5000), None, TOLD),
    Case("a base without permission", DRY, written("run.yaml", "base: closed.yaml\nname: x\n"), TOLD),
    Case("a data folder without permission", (*DRY, "data.train=[{path: closed}]"), None, TOLD),
    Case("a folder without permission", ("data", "inspect", "closed"), None, TOLD),
    Case("a pipe for a file", ("train", "pipe", "--dry-run"), None, TOLD),
    Case("a device for a base", DRY, written("run.yaml", "base: /dev/zero\n"), TOLD),
    Case("NUL in a path", (*DRY, 'data.train=[{path: "a\\0b"}]'), None, TOLD),
    Case("NUL in a base", DRY, written("run.yaml", 'base: "a\\0b"\n'), TOLD),
    Case("5,000 characters", (*DRY, f"output_dir={'x' * 5000}"), None, TOLD),
    Case("5,000 characters in an argument", ("checkpoint", "list", "x" * 5000), None, TOLD),
    Case("digits in a manifest", ("data", "inspect", "data"), manifest_of_forty_digits, TOLD),
    Case("digits in a manifest before a run", DRY, manifest_of_forty_digits, TOLD),
    Case("window", (*DRY, "model.attention.kind=sliding_window", f"model.attention.window={10**30}"), None, TOLD),
    Case("threads", (*TRAINED, "launch.threads_per_worker=100000"), None, TOLD),
    Case("batch", (*DRY, f"train.global_batch_size={10**12}"), None, TOLD),
    Case("rope factor", (*DRY, "model.rope_scaling={kind: linear, factor: 1e300}"), None, TOLD),
    Case("weights", (*DRY, "data.train=[{path: data/train, weight: 1000000}, {path: data/train}]"), None, TOLD),
    Case("a status that is a pipe", ("status", "runs/tiny"), replaced("runs/tiny/status.json", "pipe")),
    Case("a state that is a pipe", ("train", "run.yaml", "train.steps=5"), replaced(f"{STEP}/state.json", "pipe")),
    Case("a lock that leads nowhere", ("train", "run.yaml"), replaced("runs/tiny/run.lock", "dangling")),
    Case("a report onto a folder", ("report", "runs/tiny", "--out", ".."), None, TOLD),
    Case("a log that is a pipe", ("logs", "runs/tiny"), replaced("runs/tiny/logs/rank-00000.log", "pipe"), TOLD),
    Case("rows without rates", ("status", "runs/tiny"), rows_without_rates, frozenset({0})),
    Case("theta", ("import", "hf", "out"), changed("hf/config.json", "rope_parameters", "rope_theta", value={}), TOLD),
    Case("rope", ("import", "hf", "out"), changed("hf/config.json", "rope_parameters", "factor", value="8"), TOLD),
    Case("a tokenizer of 3 GB", ("import", "hf", "out"), replaced("hf/tokenizer.json", "sparse"), TOLD),
    Case("a text of 3 GB", SHARDS, replaced("texts/1.txt", "sparse"), TOLD),
    Case("a line of 3 GB", SHARDS, replaced("texts/more.jsonl", "sparse"), TOLD),
    Case("an index of 3 GB", ("data", "show", "data/train"), replaced("data/train/shard-000000.idx", "sparse"), TOLD),
    Case("an index of 3 GB anew", ("data", "index", "data/train"), replaced("data/train/shard-000000.idx", "sparse")),
    Case("a mask that is no id", GENERATED, other_config("    mask: null", "    mask: x"), TOLD),
    Case("no vocabulary", ("export", STEP, "out"), other_config("  vocab_size:", "  # vocab_size:"), TOLD),
    Case("a layout of no ranks", ("parity", "run.yaml", "--layouts", "torch:dp0"), None, TOLD),
]
"""What has once ended in a traceback, or not at all, and could be told plainly."""


@pytest.fixture(scope="module")
def good(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    make_good_things(server, folder)
    return folder


@pytest.mark.parametrize("case", KNOWN, ids=lambda case: case.title)
def test_known_cases_are_told(case: Case, server: Server, good: Path, tmp_path: Path) -> None:
    fault = fault_of(case, server, good, tmp_path / "case")
    assert fault is None, fault


@pytest.mark.parametrize("area", AREAS)
def test_some_cases_of_each_kind(area: str, server: Server, good: Path, tmp_path: Path) -> None:
    draw, count, _ = AREAS[area]
    assert faults_of(draw, count, "fixed", (server, good, tmp_path)) == ""


@pytest.mark.whole_grid
@pytest.mark.parametrize("area", AREAS)
def test_many_fresh_cases_of_each_kind(area: str, server: Server, good: Path, tmp_path: Path) -> None:
    draw, _, count = AREAS[area]
    seed = os.environ.get("HOSTILE_SEED", str(time.time_ns()))
    faults = faults_of(draw, count, seed, (server, good, tmp_path))
    assert faults == "", f"HOSTILE_SEED={seed}\n{faults}"


def faults_of(draw: Callable[[Random], Case], count: int, seed: str, where: tuple[Server, Path, Path]) -> str:
    server, good, folder = where
    cases = [draw(Random(f"{seed}-{number}")) for number in range(count)]
    return "\n\n".join(filter(None, (fault_of(case, server, good, folder / "case") for case in cases)))


def test_the_drawn_cases_meet_every_file_and_verb() -> None:
    damaged = {damaged_cases(Random(f"meet-{number}")).title for number in range(2000)}
    assert damaged == {f"damaged {name}" for name in READERS}
    lines = {command_cases(Random(f"meet-{number}")).arguments[0] for number in range(2000)}
    assert len(lines) == 16


def test_no_drawn_line_hands_a_run_over() -> None:
    drawn = [command_cases(Random(f"submit-{number}")).arguments for number in range(3000)]
    submitted = [words for words in drawn if words[0] == "submit"]
    assert len(submitted) > 50
    assert all(words[1] == "--dry-run" for words in submitted)


def test_an_end_that_is_not_allowed_is_seen(server: Server, good: Path, tmp_path: Path) -> None:
    case = Case("legal", ("schema",), None, TOLD)
    assert "exit code 0" in str(fault_of(case, server, good, tmp_path / "case"))


def test_what_takes_too_long_is_seen(server: Server, good: Path, tmp_path: Path) -> None:
    shutil.copytree(good, tmp_path / "case")
    endless = ("train", "run.yaml", "name=other", "train.steps=100000000")
    ending = server.run(endless, tmp_path / "case", cpu_seconds=1)
    assert "needed more than" in str(judged(Case("endless", endless), ending))


def test_too_much_memory_and_tracebacks_are_seen(server: Server, good: Path, tmp_path: Path) -> None:
    """With no memory beside what the imports take, no command works, and says so with a traceback."""
    shutil.copytree(good, tmp_path / "case")
    ending = server.run(("data", "verify", "data"), tmp_path / "case", more_bytes=0)
    assert "a traceback" in str(judged(Case("large", ("data", "verify", "data")), ending))
