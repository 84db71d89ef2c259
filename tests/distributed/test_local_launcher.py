"""Ranks on this machine: how they end, whoever ends first and however, and that none stays behind."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import psutil
import pytest

from llmtrain.runs.metrics_file import read_rows
from tests.architecture.source_tree import ROOT
from tests.support.command import COMMAND, ENVIRONMENT, TIMEOUT_SECONDS, llmtrain, start_llmtrain, wait_until

LONG = "train.steps=100000"
SECONDS_TO_DIE = 2.0
HOST = socket.gethostname()


def spoiled(fault: str, *arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "tests.distributed.spoiled_command", fault, *arguments]
    environment = {**ENVIRONMENT, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        line, cwd=folder, env=environment, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False
    )


def rank_processes(run: Path) -> list[int]:
    """The process of each rank of the newest attempt, as their logs say."""
    logs = sorted((run / "logs").glob("rank-*.log"))
    return [int(re.findall(r"^=== .* process (\d+)$", log.read_text("utf-8"), re.MULTILINE)[-1]) for log in logs]


def living(processes: list[int]) -> list[int]:
    return [
        process
        for process in processes
        if psutil.pid_exists(process) and psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    ]


def last_row(run: Path) -> int:
    metrics = run / "metrics.jsonl"
    complete = metrics.read_text("utf-8").rpartition("\n")[0] if metrics.exists() else ""
    return json.loads(complete.rpartition("\n")[2])["step"] if complete else 0


def status(run: Path) -> dict[str, object]:
    return json.loads((run / "status.json").read_text("utf-8"))


def losses(run: Path) -> dict[int, tuple[float, float]]:
    return {row["step"]: (row["loss"], row["grad_norm"]) for row in read_rows(run / "metrics.jsonl") if "loss" in row}


def tensors(run: Path, step: int) -> bytes:
    return (run / "checkpoints" / f"step-{step:08d}" / "rank-00000.safetensors").read_bytes()


def test_ranks_train_like_one_process(workspace: Path) -> None:
    """Documents of other lengths make the number of targets differ from step to step, and so from rank to rank."""
    runs = {}
    for count in (1, 2, 4):
        done = llmtrain("train", "run.yaml", f"name=on{count}", f"launch.num_workers={count}", folder=workspace)
        assert done.returncode == 0, done.stderr
        runs[count] = workspace / "runs" / f"on{count}"
    one = list(read_rows(runs[1] / "metrics.jsonl"))
    tokens = [row["tokens"] for row in one if "tokens" in row]
    assert len({after - before for before, after in pairwise(tokens)}) > 3
    for count in (2, 4):
        many = list(read_rows(runs[count] / "metrics.jsonl"))
        assert [row["step"] for row in one] == [row["step"] for row in many]
        for a, b in zip(one, many, strict=True):
            exact, close = ("tokens", "valid_tokens"), ("loss", "grad_norm", "valid_loss")
            assert [b.get(key) for key in exact] == [a.get(key) for key in exact]
            level = 1e-6 if a["step"] == 1 else 1e-5
            assert [b[key] for key in close if key in b] == pytest.approx(
                [a[key] for key in close if key in a], rel=level
            )
        logs = sorted((runs[count] / "logs").iterdir())
        assert [log.name for log in logs] == [f"rank-{rank:05d}.log" for rank in range(count)]
        assert "done at step 20/20" in logs[0].read_text()


def test_torchrun_gives_the_same_bits(workspace: Path) -> None:
    assert llmtrain("train", "run.yaml", "name=local", folder=workspace).returncode == 0
    torchrun = [str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc-per-node", "2"]
    line = [*torchrun, COMMAND, "train", "run.yaml", "name=torchrun", "launch.num_workers=1"]
    done = subprocess.run(
        line, cwd=workspace, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    local, other = workspace / "runs" / "local", workspace / "runs" / "torchrun"
    assert losses(local) == losses(other)
    assert tensors(local, 20) == tensors(other, 20)
    assert "num_workers: 2" in (other / "config.yaml").read_text()


def test_the_rules_count_the_ranks_that_are_there(workspace: Path) -> None:
    environment = {**ENVIRONMENT, "RANK": "0", "WORLD_SIZE": "3", "MASTER_PORT": "1"}
    line = [COMMAND, "train", "run.yaml"]
    done = subprocess.run(line, cwd=workspace, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "train.global_batch_size = 8 (run.yaml:9): must be a multiple of" in done.stderr
    assert not (workspace / "runs").exists()


def test_a_rank_that_raises_is_shown_first_and_in_full(workspace: Path) -> None:
    done = spoiled("raising", "train", "run.yaml", folder=workspace)
    assert done.returncode == 1
    errors = done.stderr[done.stderr.index("error:") :]
    assert errors.startswith(f"error: rank 1 on {HOST} failed:\nTraceback (most recent call last):")
    assert errors.index("ValueError: spoiled on purpose") < errors.index(f"then rank 0 on {HOST}: ")
    run = workspace / "runs" / "tiny"
    assert living(rank_processes(run)) == []
    assert "ValueError: spoiled on purpose" in (run / "logs" / "rank-00001.log").read_text()
    assert status(run)["status"] == "failed"
    assert status(run)["message"] == f"rank 1 on {HOST}: ValueError: spoiled on purpose"


@pytest.mark.whole_grid
def test_ranks_that_do_not_notice_are_stopped(workspace: Path) -> None:
    began = time.monotonic()
    done = spoiled("raising_beside_a_sleeper", "train", "run.yaml", folder=workspace)
    assert done.returncode == 1
    assert time.monotonic() - began < 60
    assert "then rank 0: stopped" in done.stderr
    run = workspace / "runs" / "tiny"
    assert living(rank_processes(run)) == []
    assert "rank 1 on" in str(status(run)["message"])
    assert llmtrain("train", "run.yaml", folder=workspace).returncode == 0


def test_a_users_fault_on_a_rank_keeps_its_exit_code(workspace: Path) -> None:
    done = spoiled("finding_damage", "train", "run.yaml", folder=workspace)
    assert done.returncode == 3
    assert f"error: rank 1 on {HOST}: shard-000007.tar: damaged on purpose" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_killed_rank_ends_the_run(workspace: Path) -> None:
    run = workspace / "runs" / "tiny"
    process = start_llmtrain("train", "run.yaml", LONG, folder=workspace)
    wait_until(lambda: last_row(run) >= 3, process)
    ranks = rank_processes(run)
    os.kill(ranks[1], signal.SIGKILL)
    assert process.wait(timeout=60) == 1
    output = (workspace / "output.txt").read_text()
    errors = output[output.index("error:") :]
    assert errors.startswith(f"error: rank 1 on {HOST}: was killed by SIGKILL")
    assert living(ranks) == []


def test_ranks_die_with_their_launcher(workspace: Path) -> None:
    run = workspace / "runs" / "tiny"
    process = start_llmtrain("train", "run.yaml", LONG, folder=workspace)
    wait_until(lambda: last_row(run) >= 1, process)
    ranks = rank_processes(run)
    assert living(ranks) == ranks
    process.kill()
    process.wait()
    deadline = time.monotonic() + SECONDS_TO_DIE
    while living(ranks) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert living(ranks) == []


def to_launcher(launcher: int, ranks: list[int]) -> None:
    os.kill(launcher, signal.SIGTERM)


def to_a_rank(launcher: int, ranks: list[int]) -> None:
    os.kill(ranks[1], signal.SIGUSR1)


def to_all(launcher: int, ranks: list[int]) -> None:
    """As a keyboard does: it interrupts every process of the group at once."""
    for process in (launcher, *ranks):
        os.kill(process, signal.SIGINT)


@pytest.mark.parametrize(
    "tell", [*(pytest.param(tell, marks=pytest.mark.whole_grid) for tell in (to_launcher, to_a_rank)), to_all]
)
def test_told_to_stop_all_ranks_save_the_same_step(workspace: Path, tell: Callable[[int, list[int]], None]) -> None:
    stopped = workspace / "runs" / "stopped"
    arguments = ("train", "run.yaml", "name=stopped", "train.steps=60", "checkpoint.every_steps=0")
    process = start_llmtrain(*arguments, folder=workspace)
    wait_until(lambda: last_row(stopped) >= 5, process)
    tell(process.pid, rank_processes(stopped))
    assert process.wait(timeout=60) == 75
    step = last_row(stopped)
    assert step < 60
    assert [path.name for path in (stopped / "checkpoints").iterdir()] == [f"step-{step:08d}"]
    assert (status(stopped)["status"], status(stopped)["step"]) == ("preempted", step)

    assert llmtrain(*arguments, folder=workspace).returncode == 0
    assert llmtrain(*arguments, "name=whole", folder=workspace).returncode == 0
    whole = workspace / "runs" / "whole"
    assert losses(stopped) == losses(whole)
    assert tensors(stopped, 60) == tensors(whole, 60)
    headers = [line for line in (stopped / "logs" / "rank-00001.log").read_text().splitlines() if "===" in line]
    assert len(headers) == 2


def test_told_to_stop_while_a_rank_hangs_asks_to_be_started_again(workspace: Path) -> None:
    """Nothing is saved any more, and Slurm requeues only what ends with 75."""
    run = workspace / "runs" / "tiny"
    line = [sys.executable, "-m", "tests.distributed.spoiled_command", "hanging", "train", "run.yaml", LONG]
    line += ["launch.max_stalled_attempts=3", "launch.watchdog.step_seconds=5", "launch.watchdog.data_seconds=5"]
    process = subprocess.Popen(
        line, cwd=workspace, env={**ENVIRONMENT, "PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, text=True
    )
    wait_until((workspace / "hanging").exists, process)
    process.send_signal(signal.SIGTERM)
    told = process.communicate(timeout=TIMEOUT_SECONDS)[1]
    assert process.returncode == 75, told
    assert "told to stop, and not saved: the same command continues from the beginning" in told
    assert (status(run)["status"], living(rank_processes(run))) == ("preempted", [])


def test_told_twice_ends_at_once(workspace: Path) -> None:
    run = workspace / "runs" / "tiny"
    line = [sys.executable, "-m", "tests.distributed.spoiled_command", "crawling", "train", "run.yaml", LONG]
    with (workspace / "output.txt").open("w") as output:
        environment = {**ENVIRONMENT, "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(line, cwd=workspace, env=environment, stderr=output, text=True)
    wait_until(lambda: last_row(run) >= 1, process)
    ranks = rank_processes(run)
    process.send_signal(signal.SIGTERM)
    wait_until(lambda: "SIGTERM" in (workspace / "output.txt").read_text(), process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 143
    deadline = time.monotonic() + SECONDS_TO_DIE
    while living(ranks) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert living(ranks) == []


@pytest.mark.whole_grid
def test_what_rank_0_refuses_ends_all_ranks_with_its_exit_code(workspace: Path) -> None:
    assert llmtrain("train", "run.yaml", folder=workspace).returncode == 0
    run = workspace / "runs" / "tiny"
    used = llmtrain("train", "run.yaml", "checkpoint.resume=none", folder=workspace)
    assert used.returncode == 2
    assert f"error: rank 0 on {HOST}: checkpoint.resume = none" in used.stderr
    assert f"then rank 1 on {HOST}: rank 0 could not start" in used.stderr

    newest = run / "checkpoints" / "step-00000020" / "rank-00000.safetensors"
    content = bytearray(newest.read_bytes())
    content[-100] ^= 1
    newest.write_bytes(content)
    resumed = llmtrain("train", "run.yaml", f"checkpoint.resume={newest.parent}", folder=workspace)
    assert resumed.returncode == 3
    assert "sha256" in resumed.stderr and "Traceback" not in resumed.stderr

    again = llmtrain("train", "run.yaml", folder=workspace)
    assert again.returncode == 0
    assert "from step 10" in again.stderr


@pytest.mark.whole_grid
def test_a_second_launcher_in_the_same_folder_is_refused(workspace: Path) -> None:
    run = workspace / "runs" / "tiny"
    process = start_llmtrain("train", "run.yaml", LONG, folder=workspace)
    wait_until(lambda: last_row(run) >= 1, process)
    second = llmtrain("train", "run.yaml", folder=workspace)
    step = last_row(run)
    wait_until(lambda: last_row(run) > step, process)
    process.kill()
    process.wait()
    assert second.returncode == 4
    assert f"in use by process {rank_processes(run)[0]}" in second.stderr
