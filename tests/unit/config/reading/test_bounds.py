"""Configurations that are small on storage and huge in memory, too deep, or that cannot be opened."""

import os
import resource
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from llmtrain.config.reading.document import DEEPEST, LONGEST_BYTES, MOST_VALUES, load_plain
from llmtrain.config.reading.load import DEEPEST_BASES, MOST_FILES, load_config
from llmtrain.errors import ConfigError
from tests.support.run_files import write_good_run

LETTERS = "abcdefghi"


def bomb() -> str:
    """Nine anchors, each nine times in the next: 9^9 values."""
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    for before, name in pairwise(LETTERS):
        lines.append(f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]")
    return "\n".join(lines)


def chain_of_aliases() -> str:
    """Each anchor holds the one before: no deep text, but a deep value."""
    return "a0: &a0 x\n" + "".join(f"a{n}: &a{n} [*a{n - 1}]\n" for n in range(1, 100))


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        pytest.param(bomb(), f"stands for more than {MOST_VALUES:,} values", id="nested anchors"),
        pytest.param(chain_of_aliases(), f"more than {DEEPEST} values lie inside each other", id="chain of aliases"),
        pytest.param("x: " + "[" * 2000, f"more than {DEEPEST} values lie inside each other", id="brackets"),
        pytest.param("x:\n" + "- " * 2000, f"more than {DEEPEST} values lie inside each other", id="dashes"),
        pytest.param("x: [" + "a, " * MOST_VALUES + "]", f"holds more than {MOST_VALUES:,} values", id="many values"),
        pytest.param("#" * (LONGEST_BYTES + 1), "bytes, more than such a file can have", id="many bytes"),
        pytest.param("x: &x [*x]", "an alias may not stand inside its own anchor", id="endless"),
        pytest.param("seed: 1" + "0" * 5000, "seed", id="digits"),
        pytest.param("seed: 0x1" + "0" * 5000, "has more digits than any number here", id="hexadecimal digits"),
    ],
)
def test_a_file_beyond_bounds_is_refused(
    tmp_path: Path, text: str, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ConfigError, match=r"run\.yaml") as raised:
        load_config(Path("run.yaml"))
    assert fault in str(raised.value)
    assert len(str(raised.value)) < 10_000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000, "kB"


@pytest.mark.parametrize("text", [bomb(), "[" * 5000, "x: &x [*x]", "!!python/object:os.system {}", "x: 1\nx: 2"])
def test_plain_values_are_bounded_too(text: str) -> None:
    with pytest.raises(ValueError, match=r"line \d|x:|x \("):
        load_plain(text)


@pytest.mark.parametrize(
    "override",
    ["seed=" + "[" * 2000, "seed=" + "{" * 2000, "a." * 2000 + "a=1", "optim.lr=1" + "0" * 9000, "name=\0", "x" * 5000],
)
def test_an_override_beyond_bounds_is_refused(tmp_path: Path, override: str) -> None:
    with pytest.raises(ConfigError, match=r"command line|optim\.lr") as raised:
        load_config(write_good_run(tmp_path), [override])
    assert len(str(raised.value)) < 3000


def test_bases_that_name_each_other_many_times_are_refused(tmp_path: Path) -> None:
    for number in range(10):
        (tmp_path / f"{number}.yaml").write_text(f"base: [{', '.join([f'{number + 1}.yaml'] * 10)}]")
    (tmp_path / "10.yaml").write_text("name: x")
    with pytest.raises(ConfigError, match=f"rests on too many files: {DEEPEST_BASES} in a row and {MOST_FILES} in all"):
        load_config(tmp_path / "0.yaml")


def test_a_long_chain_of_bases_is_refused(tmp_path: Path) -> None:
    for number in range(500):
        (tmp_path / f"{number}.yaml").write_text(f"base: {number + 1}.yaml")
    (tmp_path / "500.yaml").write_text("name: x")
    with pytest.raises(ConfigError, match="rests on too many files"):
        load_config(tmp_path / "0.yaml")


@pytest.mark.parametrize("name", ['"\\0"', "x" * 300, "x" * 5000, "a/" * 3000, "pipe", "/dev/zero", '"\\uD800"'])
def test_a_base_that_cannot_be_opened_is_named(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "run.yaml").write_text(f"name: x\nbase: {name}\n")
    with pytest.raises(ConfigError, match=r"run\.yaml:2"):
        load_config(tmp_path / "run.yaml")


def test_a_file_without_permission_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_good_run(tmp_path)
    (tmp_path / "more.yaml").write_text("seed: 1")
    run.write_text(f"base: more.yaml\n{run.read_text()}")

    def refused(path: Path, *args: Any, **options: Any) -> Any:
        if str(path).endswith("more.yaml"):
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *args, **options)

    opened = os.open
    monkeypatch.setattr(os, "open", refused)
    with pytest.raises(ConfigError, match=r"more\.yaml \(.*run\.yaml:1\).*cannot be read: Permission denied"):
        load_config(run)


@pytest.mark.parametrize(
    ("weights", "accepted"),
    [((1, 999_999), True), ((1, 1_000_000), False), ((500_000, 500_001), False), ((10**9, 3 * 10**9), True)],
)
def test_weights_of_a_mixture_have_a_period(tmp_path: Path, weights: tuple[int, ...], accepted: bool) -> None:
    sources = ", ".join(f"{{path: source-{number}, weight: {weight}}}" for number, weight in enumerate(weights))
    load = [write_good_run(tmp_path), [f"data.train=[{sources}]"]]
    if accepted:
        load_config(*load)
        return
    with pytest.raises(ConfigError, match=r"data\.train.*add up to .* 1,000,000 at most"):
        load_config(*load)
