"""The Slurm launcher without Slurm: srun is a stand-in that starts the tasks here."""

import os
import socket
import sys
from pathlib import Path

import pytest

from launch.on_slurm.launcher import cpus_per_task, launch
from launch.on_slurm.step import Step, srun_line
from launch.rank.signals import StopSignal
from llmtrain.config.reading.load import load_config
from llmtrain.config.schema import RunConfig
from llmtrain.errors import LaunchError
from llmtrain.preflight.resolve import resolve
from tests.support.run_files import write_good_run

SRUN = """#!{python} -S
import os, subprocess, sys
count = int(next(word for word in sys.argv if word.startswith("--ntasks=")).partition("=")[2])
command = sys.argv[sys.argv.index({python!r}):]
told = sys.stdin.buffer.read()
job = {{"SLURM_JOB_ID": "7", "SLURM_STEP_NUM_TASKS": str(count), "SLURM_STEP_TASKS_PER_NODE": str(count)}}
job["SLURM_LAUNCH_NODE_IPADDR"] = "127.0.0.1"
tasks = []
for rank in range(count):
    place = {{"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_NODEID": "0"}}
    tasks.append(subprocess.Popen(command, stdin=subprocess.PIPE, env={{**os.environ, **job, **place}}))
    tasks[-1].stdin.write(told)
    tasks[-1].stdin.close()
sys.exit(max([task.wait() for task in tasks]))
"""


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    """A run of two ranks, in a folder that has a stand-in for srun."""
    path = write_good_run(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    put_srun(SRUN.format(python=sys.executable))
    return load_config(path, ["launch.num_workers=2", "launch.threads_per_worker=1"]).config


def put_srun(text: str) -> None:
    Path("srun").write_text(text, "utf-8")
    Path("srun").chmod(0o755)


def test_outside_of_a_job_it_says_what_to_do(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with pytest.raises(LaunchError, match="llmtrain submit CONFIG --to slurm"):
        launch(resolve(config))


def test_the_job_says_how_many_cpus_a_task_has(config: RunConfig) -> None:
    job = {"SLURM_JOB_ID": "7"}
    assert cpus_per_task(config, {**job, "SLURM_CPUS_PER_TASK": "6"}) == 6
    assert cpus_per_task(config, job) == 1
    assert cpus_per_task(config.with_keys({"launch.threads_per_worker": 3}), job) == 3


def test_srun_gets_one_task_per_rank_and_nothing_of_the_run(config: RunConfig) -> None:
    line = srun_line(config.with_keys({"launch.num_workers": 8, "launch.slurm.nodes": 2}), cpus_per_task=6)
    assert {"--nodes=2", "--ntasks=8", "--ntasks-per-node=4", "--cpus-per-task=6", "--kill-on-bad-exit=1"} <= set(line)
    assert line[-3:] == [sys.executable, "-m", "launch.on_slurm.task"]


def test_tasks_come_by_rank_and_go_with_their_launcher(config: RunConfig) -> None:
    step = Step(config, cpus_per_task=1)
    try:
        # Somebody else who says nothing keeps no task waiting, and one who does not know the key is not let in.
        silent = socket.create_connection(("127.0.0.1", step._listener.getsockname()[1]))
        stranger = socket.create_connection(("127.0.0.1", step._listener.getsockname()[1]))
        stranger.sendall(b"\x00\x00\x00\x20" + bytes(32))
        tasks = step.gather(2, StopSignal())
        assert tasks is not None
        assert [(task.place.rank, task.host, task.address) for task in tasks] == [
            (rank, socket.gethostname(), "127.0.0.1") for rank in range(2)
        ]
        silent.close()
        stranger.close()
    finally:
        step.end(tasks or ())
    assert step._srun.returncode == 0  # they went by themselves


@pytest.mark.parametrize(
    ("srun", "said"),
    [
        ("#!/bin/bash\nexit 7\n", "srun has ended with exit code 7 before all 2 ranks were ready"),
        (
            SRUN.format(python=sys.executable).replace("range(count)", "range(1)"),
            r"ranks .*1 were not ready within launch\.timeout_seconds = 3",
        ),
    ],
)
def test_tasks_that_do_not_come_are_told(config: RunConfig, srun: str, said: str) -> None:
    put_srun(srun)
    step = Step(config.with_keys({"launch.timeout_seconds": 3.0}), cpus_per_task=1)
    try:
        with pytest.raises(LaunchError, match=said):
            step.gather(2, StopSignal())
    finally:
        step.end()


def test_without_srun_it_says_so(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(LaunchError, match="srun: cannot be started"):
        Step(config, cpus_per_task=1)
