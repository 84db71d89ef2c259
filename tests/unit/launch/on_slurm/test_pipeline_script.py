"""Batch scripts of data pipelines: what Slurm is asked for, and what bash does with the bodies."""

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from launch.on_slurm import batch_script
from launch.on_slurm.asked_job import BODY_MARK, COMMAND, PIPELINE_ON_RAY
from llmtrain.cli import main
from llmtrain.config.pipelines.schema import PipelineConfig
from llmtrain.config.reading.pipeline import load_pipeline
from llmtrain.errors import ConfigError
from tests.architecture.source_tree import ROOT
from tests.unit.launch.on_slurm.test_batch_script import (
    LISTENER,
    RECORD,
    header,
    hostile,
    hostile_key,
    hostile_name,
    outcome,
    put_command,
)

PIPELINE = "name: corpus\nread: [{path: raw}]\n"
DATA_RUN = (ROOT / "slurm" / "data_run.sbatch").read_text("utf-8")
TRAIN = (ROOT / "slurm" / "train.sbatch").read_text("utf-8")
ON_RAY = (ROOT / "slurm" / "train_on_ray.sbatch").read_text("utf-8")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "pipeline.yaml").write_text(PIPELINE, "utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def loaded(*overrides: str) -> PipelineConfig:
    return load_pipeline(Path("pipeline.yaml"), overrides).config


def rendered(*overrides: str) -> str:
    return batch_script.render(loaded(*overrides), Path("pipeline.yaml"), overrides)


def body_of(text: str) -> str:
    return text.partition(BODY_MARK)[2]


def test_the_header_of_processes(folder: Path) -> None:
    overrides = ("run.workers=6", "run.slurm.time='60'", "run.slurm.memory=8G", "run.slurm.warn_seconds=300")
    assert header(rendered(*overrides)) == [
        "--job-name=corpus",
        "--nodes=1",
        "--ntasks=1",
        "--ntasks-per-node=1",
        "--cpus-per-task=6",
        "--time=60",
        "--mem=8G",
        "--signal=B:USR1@300",
        "--requeue",
        "--open-mode=append",
        f"--output={folder}/data/corpus/logs/slurm-%j.log",
    ]


@pytest.mark.parametrize(
    ("overrides", "size"),
    [
        ((), ["--nodes=1", "--ntasks=1", "--ntasks-per-node=1", "--exclusive"]),
        (("run.slurm.exclusive=true",), ["--nodes=1", "--ntasks=1", "--ntasks-per-node=1", "--exclusive"]),
        (
            ("run.backend=ray", "run.slurm.nodes=3", "run.workers=6"),
            ["--nodes=3", "--ntasks=3", "--ntasks-per-node=1", "--cpus-per-task=2"],
        ),
        (
            ("run.backend=ray", "run.slurm.nodes=3"),
            ["--nodes=3", "--ntasks=3", "--ntasks-per-node=1", "--exclusive"],
        ),
    ],
)
def test_how_large_a_job_is(folder: Path, overrides: tuple[str, ...], size: list[str]) -> None:
    options = header(rendered(*overrides))
    assert options[1 : 1 + len(size)] == size
    assert options.count("--exclusive") == ("--exclusive" in size)


def test_bodies_are_those_of_the_files_for_use_by_hand(folder: Path) -> None:
    """That of a pipeline on Ray is a run's, but for the command."""
    assert rendered().endswith(body_of(DATA_RUN)) and len(body_of(DATA_RUN)) > 500
    on_ray = rendered("run.backend=ray").partition("\nset -u\n")[2]
    assert f"    exec {PIPELINE_ON_RAY}\n) &\n" in on_ray and "llmtrain train" not in on_ray
    assert on_ray == COMMAND.sub(lambda _: PIPELINE_ON_RAY, body_of(ON_RAY)).partition("set -u\n")[2]
    done = subprocess.run(["bash", "-n", "-c", on_ray], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


COMMON = {
    "signals": ("# Slurm tells this shell", "trap tell USR1 TERM\n"),
    "waiting": ("launcher=$!\n", "code=$?\n"),
    "the requeue": ("# 75: saved", None),
}
"""Where parts that all scripts have begin, and where they end."""


@pytest.mark.parametrize("part", COMMON)
def test_what_scripts_have_in_common_is_the_same_in_each(part: str) -> None:
    """They are copies, so that each can be given to sbatch alone."""
    begin, end = COMMON[part]
    texts = {text[text.index(begin) : text.index(end) if end else None] for text in (TRAIN, DATA_RUN, ON_RAY)}
    assert len(texts) == 1 and len(texts.pop()) > 100


def test_beside_the_command_and_words_about_it_data_run_is_train() -> None:
    left, right = (COMMAND.sub("COMMAND", body_of(text)).splitlines() for text in (TRAIN, DATA_RUN))
    different = [pair for pair in zip(left, right, strict=True) if pair[0] != pair[1]]
    assert [pair[0].lstrip()[:6] for pair in different] == ['echo "', "# The ", "# igno"]


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=hostile_name, config_name=hostile, overrides=st.lists(hostile, max_size=3), setup=hostile_key)
def test_hostile_values_arrive_byte_for_byte_and_run_nothing(
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
    config_name: str,
    overrides: list[str],
    setup: str,
) -> None:
    """The whole script, but for its header, with llmtrain as a stand-in that records what it gets."""
    sandbox = tmp_path_factory.mktemp("sandbox")
    folder, commands = sandbox / place, sandbox / f"bin {place.replace(':', '')}"
    folder.mkdir()
    put_command(commands, "llmtrain", RECORD)
    (folder / setup).write_text("export SETUP_RAN=1\n", "utf-8")
    (sandbox / "pipeline.yaml").write_text(PIPELINE, "utf-8")
    monkeypatch.setattr(sys, "executable", str(commands / "python"))
    config = load_pipeline(sandbox / "pipeline.yaml", ["output_dir=/plain"]).config
    config = config.with_keys({"run.slurm.setup": setup})
    script = batch_script.render(config, Path(config_name), overrides, folder)
    assert len(header(script)) == len(header(batch_script.render(config, Path("x"), [], Path("/x"))))
    before = {path: path.is_dir() for path in sandbox.rglob("*")}

    environment = {"PATH": "/usr/bin:/bin", "SANDBOX": str(sandbox), "HOME": str(sandbox)}
    environment |= {"SLURM_JOB_ID": "7", "SLURM_CPUS_ON_NODE": "4"}
    done = subprocess.run(
        ["bash", "-c", script], cwd="/", env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    words = [os.fsdecode(word) for word in (sandbox / "arguments").read_bytes().split(b"\0")[:-1]]
    ours = ["run.backend=processes", "run.workers=4"]
    assert words == ["data", "run", "--", str(Path(config_name)), *overrides, *ours]
    assert os.fsdecode((sandbox / "folder").read_bytes()) == f"{folder}\n"
    after = {path: path.is_dir() for path in sandbox.rglob("*")}
    assert after == {**before, sandbox / "arguments": False, sandbox / "folder": False}


def test_a_job_that_asked_for_cpus_has_as_many_processes(tmp_path: Path) -> None:
    """An allocation may be rounded up to whole cores."""
    put_command(tmp_path / "bin", "llmtrain", RECORD)
    environment = {"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin", "SANDBOX": str(tmp_path)}
    environment |= {"SLURM_CPUS_ON_NODE": "4", "SLURM_CPUS_PER_TASK": "3"}
    subprocess.run(["bash", "-c", f"set -- p.yaml\n{body_of(DATA_RUN)}"], env=environment, check=True, timeout=60)
    assert (tmp_path / "arguments").read_bytes().endswith(b"\0run.workers=3\0")


@pytest.mark.parametrize("name", ["a\nb", "a\\b"])
def test_paths_that_slurm_cannot_take_for_a_log_are_refused(folder: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"output_dir = .*Choose another folder"):
        batch_script.render(loaded(), Path("pipeline.yaml"), [], Path("/") / name)


def test_what_matters_to_slurm_alone_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        rendered("run.backend=ray", "run.slurm.nodes=2", "run.workers=3", "run.grace_seconds=500")
    assert [problem.key for problem in refused.value.problems] == ["run.grace_seconds", "run.workers"]


def test_credentials_do_not_get_into_a_script(folder: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        rendered("read.0.path=https://user:canary@host/d?sig=canary")
    assert "read.0.path = https://host/d (command line)" in str(refused.value)
    assert "canary" not in str(refused.value)


def test_the_script_is_private_and_lies_in_the_folder_of_the_pipeline(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_command(folder / "bin", "sbatch", '#!/bin/bash\nprintf "%s\\n" "$@" > asked; echo "42;cluster"\n')
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:/usr/bin:/bin")
    assert batch_script.submit(loaded(), Path("pipeline.yaml"), []) == "42"
    script = folder / "data" / "corpus" / "job.sbatch"
    assert (folder / "asked").read_text().splitlines() == ["--parsable", str(script)]
    assert stat.S_IMODE(script.stat().st_mode) == 0o600 and script.read_text("utf-8") == rendered()
    with pytest.raises(ConfigError, match=r"run\.slurm\.setup = no\.sh: there is no such file"):
        batch_script.submit(loaded("run.slurm.setup=no.sh"), Path("pipeline.yaml"), [])


@pytest.mark.parametrize("code", [0, 1, 3, 143])
def test_other_codes_are_passed_on_and_not_requeued(tmp_path: Path, code: int) -> None:
    assert outcome(tmp_path, f"SLURM_CPUS_ON_NODE=1\n{body_of(DATA_RUN)}", f"sys.exit({code})") == (code, False)


def test_what_has_stopped_is_requeued(tmp_path: Path) -> None:
    body = f"SLURM_CPUS_ON_NODE=1\n{body_of(DATA_RUN)}"
    assert outcome(tmp_path, body, LISTENER, tell=[signal.SIGUSR1]) == (75, True)


def test_a_dry_run_prints_the_script_alone_once_everything_is_right(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "list.txt").write_text("word\n")
    overrides = ("run.workers=2", "steps=[{words: {files: [list.txt]}}]")
    line = ["submit", "pipeline.yaml", "--to", "slurm", "--dry-run", *overrides]
    with pytest.raises(SystemExit) as ended:
        main(line)
    said = capsys.readouterr()
    assert ended.value.code == 2 and said.out == ""
    assert "read.0.path = raw (pipeline.yaml:2): no such file, folder or pattern with files." in said.err
    (folder / "raw").mkdir()
    with pytest.raises(SystemExit) as ended:
        main(line)
    said = capsys.readouterr()
    assert (ended.value.code, said.err) == (0, "")
    assert said.out == rendered(*overrides)
    assert not (folder / "data").exists()
