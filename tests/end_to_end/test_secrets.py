"""A password and a signature in a data set's URL stand in nothing that llmtrain writes, prints or runs."""

import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.end_to_end.conftest import CONFIG
from tests.support.command import llmtrain
from tests.support.http_folder import serve

CANARIES = ("canary-password", "canary-signature")
WATCHED = "canary-of-the-run"
"""The user of the URLs of the run: beside it, other tests write the others into command lines."""
OWN = ("run.yaml", "wrong.yaml")
"""Where the user has written them."""


def url(server: str, path: str, user: str = "user") -> str:
    return f"{server.replace('://', f'://{user}:{CANARIES[0]}@')}{path}?sig={CANARIES[1]}"


def holds_one(text: str) -> bool:
    return any(canary in text for canary in (WATCHED, *CANARIES))


@dataclass
class Watched:
    """The folder in which commands have run; `seen` are arguments of programs that held a canary meanwhile."""

    folder: Path
    seen: set[str] = field(default_factory=set)
    said: dict[str, str] = field(default_factory=dict)
    over: threading.Event = field(default_factory=threading.Event)

    def run(self, *arguments: str, code: int = 0) -> None:
        done = llmtrain(*arguments, folder=self.folder)
        assert done.returncode == code, done.stderr
        self.said[" ".join(arguments)] = done.stdout + done.stderr

    def watch(self) -> None:
        while not self.over.wait(0.2):
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                try:
                    words = path.read_text(errors="replace")
                except OSError:
                    continue
                if WATCHED in words:
                    self.seen.add(words)


@pytest.fixture(scope="module")
def used(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """Every command of a run whose data comes from URLs with a password and a signature."""
    folder = tmp_path_factory.mktemp("secrets")
    with serve(shards / "data") as server:
        text = CONFIG
        for split in ("train", "valid"):
            text = text.replace(f"data/{split}", url(server.url, f"/{split}", WATCHED))
        for long, short in (("steps: 40", "steps: 4"), ("steps: 20", "steps: 2"), ("up_steps: 5", "up_steps: 1")):
            text = text.replace(long, short)
        (folder / "run.yaml").write_text(text)
        watched = Watched(folder)
        watcher = threading.Thread(target=watched.watch, daemon=True)
        watcher.start()
        trackers = ("observe.wandb=offline", "observe.tensorboard=true", "observe.wandb_artifacts=final")
        cache = ("data.cache_dir=cache", "data.fetch_attempts=1")
        try:
            watched.run("train", "run.yaml", *cache, "--print-config")
            watched.run("train", "run.yaml", *cache, "--dry-run")
            watched.run("train", "run.yaml", *cache, *trackers, "launch.num_workers=2")
            watched.run("train", "run.yaml", *cache, *trackers, "train.steps=6", "optim.lr=1e-3")
            watched.run("checkpoint", "inspect", "runs/tiny", "--json")
            for verb in (("status", "--json"), ("logs",), ("report",)):
                watched.run(verb[0], "runs/tiny", *verb[1:])
            watched.run("export", "runs/tiny", "exported")
            watched.run("submit", "run.yaml", "--to", "ray", "--dry-run", *cache)
            watched.run("submit", "run.yaml", "--to", "slurm", "--dry-run", *cache)
            server.forever["manifest.json"] = "403"
            watched.run("train", "run.yaml", *cache, "name=other", code=2)
            server.forever["manifest.json"] = "spoil"
            watched.run("train", "run.yaml", *cache, "name=other", code=3)
        finally:
            watched.over.set()
            watcher.join()
        yield watched


def test_nothing_that_is_written_holds_them(used: Watched) -> None:
    assert (used.folder / "exported" / "README.md").is_file() and (used.folder / "runs/tiny/wandb").is_dir()
    written = [path for path in used.folder.rglob("*") if path.is_file() and path.name not in OWN]
    assert len(written) > 30
    assert not [path for path in written if holds_one(path.read_bytes().decode(errors="replace"))]


def test_nothing_that_is_printed_holds_them(used: Watched) -> None:
    assert not [line for line, said in used.said.items() if holds_one(said)]
    assert "/train\n" in used.said["train run.yaml data.cache_dir=cache data.fetch_attempts=1 --print-config"]


def test_no_program_has_them_among_its_arguments(used: Watched) -> None:
    assert not used.seen


def test_a_run_whose_old_files_hold_them_is_reported_without(used: Watched, tmp_path: Path) -> None:
    """Runs of before have kept the configuration as it was written."""
    run = tmp_path / "tiny"
    shutil.copytree(used.folder / "runs" / "tiny", run, ignore=shutil.ignore_patterns("checkpoints", "wandb"))
    text = (run / "config.yaml").read_text().partition("\n")[2]  # without the seal, which those did not have
    (run / "config.yaml").write_text(text.replace("/train", f"/train?sig={CANARIES[1]}"))
    done = llmtrain("report", "tiny", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "/train" in (run / "report.html").read_text()
    assert CANARIES[1] not in (run / "report.html").read_text()
    (run / "config.yaml").write_text((run / "config.yaml").read_text() + "\n: [")
    done = llmtrain("report", "tiny", folder=tmp_path)
    assert done.returncode == 3, done.stderr
    assert CANARIES[1] not in done.stderr


@pytest.mark.parametrize(
    "line",
    [
        "data: {train: URL}",
        "data: {train: {path: URL}}",
        "data: {train: [{path: [URL]}]}",
        "data: {train: [{path: x, URL: 1}]}",
        "data: {train: [{path: URL, path: URL}]}",
        "data: {train: [{path: URL}], tokenizer: URL}",
        "data: {train: [{path: 'URL}]}",
        "checkpoint: {resume: URL}",
        "output_dir: URL",
        "base: URL",
        "URL: 1",
    ],
)
def test_no_error_about_a_file_repeats_them(tmp_path: Path, line: str) -> None:
    (tmp_path / "wrong.yaml").write_text(line.replace("URL", url("https://host.invalid", "/d")))
    done = llmtrain("train", "wrong.yaml", "--dry-run", folder=tmp_path)
    assert done.returncode == 2, done.stderr
    assert not [canary for canary in CANARIES if canary in done.stderr + done.stdout], done.stderr


@pytest.mark.parametrize(
    "override", ["data.train=[{path: URL}", "data.train.0.path=[URL", "data.trian=URL", "URL", "URL=1"]
)
def test_no_error_about_the_command_line_repeats_them(tmp_path: Path, override: str) -> None:
    (tmp_path / "run.yaml").write_text(CONFIG)
    done = llmtrain("train", "run.yaml", override.replace("URL", url("https://host.invalid", "/d")), folder=tmp_path)
    assert done.returncode == 2, done.stderr
    assert not [canary for canary in CANARIES if canary in done.stderr + done.stdout], done.stderr
