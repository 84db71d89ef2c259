"""The wheel works alone: in a folder of its own it does the main job, and opens no file of the repository."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
PACKAGES = ("llmtrain", "launch", "data_pipelines", "slurm", "configs")

GUARD = """\
import os, sys
from pathlib import Path

repository, environment, installed, log = os.environ["WHEEL_TEST"].split(os.pathsep)
sys.path[:] = [entry for entry in sys.path if entry == installed or not (Path(entry) / "llmtrain").is_dir()]

def note(event, arguments):
    if event != "open" or not isinstance(arguments[0], str):
        return
    path = os.path.abspath(arguments[0])
    of_the_repository = path.startswith(repository + os.sep) and not path.startswith(environment + os.sep)
    if of_the_repository or path.startswith(os.path.join(installed, "configs")):
        with open(log, "a") as file:
            file.write(path + "\\n")

sys.addaudithook(note)
"""
"""Python imports it in every process, `sitecustomize`, once all folders are known: the repository's is taken away."""

RUN = """\
name: alone
model: {base: llmtrain:models/llama-tiny.yaml, vocab_size: 512}
data: {train: [{path: data/train}], valid: [{path: data/valid}], seq_len: 64}
train: {steps: 3, global_batch_size: 4, micro_batch_size: 2}
observe: {wandb: "off", tensorboard: false}
launch: {threads_per_worker: 1}
"""


def files_of(folder: Path) -> Iterator[str]:
    """Files of the packages, relative to a folder that has all of them."""
    for package in PACKAGES:
        for path in (folder / package).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                yield str(path.relative_to(folder))


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel in it, built from a copy: building leaves files behind."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    for package in PACKAGES:
        shutil.copytree(REPOSITORY / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    alone = ("--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check")
    command = [sys.executable, "-m", "pip", "install", *alone, "--target", target, source]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return target


def test_every_file_of_the_packages_is_in_the_wheel(installed: Path) -> None:
    """Presets, bodies of sbatch files and the report's page among them."""
    assert set(files_of(REPOSITORY)) == set(files_of(installed))


def test_the_main_job_needs_nothing_of_the_repository(installed: Path, shards: Path, tmp_path: Path) -> None:
    guard, log, elsewhere = tmp_path / "guard", tmp_path / "opened", tmp_path / "elsewhere"
    guard.mkdir()
    elsewhere.mkdir()
    (guard / "sitecustomize.py").write_text(GUARD, "utf-8")
    (elsewhere / "data").symlink_to(shards / "data")
    (elsewhere / "run.yaml").write_text(RUN, "utf-8")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((str(guard), str(installed))),
        "WHEEL_TEST": os.pathsep.join((str(REPOSITORY), sys.prefix, str(installed), str(log))),
    }

    def llmtrain(*arguments: str) -> str:
        command = [sys.executable, installed / "bin" / "llmtrain", *arguments]
        done = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    llmtrain("train", "run.yaml")
    assert len((elsewhere / "runs/alone/metrics.jsonl").read_text().splitlines()) >= 3
    llmtrain("report", "runs/alone")
    assert "<script" in (elsewhere / "runs/alone/report.html").read_text()
    script = llmtrain("submit", "run.yaml", "--to", "slurm", "--dry-run", "launch.slurm.nodes=1")
    assert "srun" in script
    assert "name: quickstart" in llmtrain("train", "llmtrain:runs/quickstart.yaml", "--print-config")

    opened = set(log.read_text().splitlines())
    assert str(installed / "configs/models/llama-tiny.yaml") in opened, "the guard hears what is opened"
    assert [path for path in opened if not path.startswith(str(installed))] == []
