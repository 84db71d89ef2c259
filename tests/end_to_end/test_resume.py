"""Killed, told to stop, or left alone: the run ends with the same bits."""

import hashlib
import json
import random
import re
import signal
from pathlib import Path

import psutil
import pytest
import torch

from llmtrain.checkpoint.reader import open_checkpoint
from llmtrain.runs.metrics_file import read_rows
from llmtrain.values.fragment import Box
from tests.support.command import llmtrain, start_llmtrain, wait_until


def last_step(run: Path) -> int:
    metrics = run / "metrics.jsonl"
    complete = metrics.read_text("utf-8").rpartition("\n")[0] if metrics.exists() else ""
    return json.loads(complete.rpartition("\n")[2])["step"] if complete else 0


def losses(run: Path) -> dict[int, tuple[float, float]]:
    return {row["step"]: (row["loss"], row["grad_norm"]) for row in read_rows(run / "metrics.jsonl") if "loss" in row}


def assert_same_end(a: Path, b: Path) -> None:
    """Weights, moments, counts and every step's loss are equal, bit for bit."""
    first, second = (open_checkpoint(run / "checkpoints" / "step-00000040") for run in (a, b))
    assert first.state == second.state
    names = [(info.name, info.kind) for info in first.tensors()]
    assert len(names) > 50
    assert names == [(info.name, info.kind) for info in second.tensors()]
    for name, kind in names:
        box = Box.whole(first.global_shape(name, kind) or ())
        assert torch.equal(first.read(name, kind, box), second.read(name, kind, box)), (name, kind)
    assert losses(a) == losses(b)
    assert list(losses(a)) == list(range(1, 41))


def test_killed_and_resumed_ends_with_the_same_bits(workspace: Path) -> None:
    whole = llmtrain("train", "run.yaml", "name=whole", folder=workspace)
    assert whole.returncode == 0, whole.stderr

    process = start_llmtrain("train", "run.yaml", "name=killed", folder=workspace)
    killed = workspace / "runs" / "killed"
    wait_until(lambda: last_step(killed) > 20 and (killed / "checkpoints" / "step-00000020").exists(), process)
    process.kill()
    process.wait()
    assert last_step(killed) < 40
    resumed = llmtrain("train", "run.yaml", "name=killed", folder=workspace)
    assert resumed.returncode == 0, resumed.stderr
    assert "from step 20" in resumed.stderr
    assert_same_end(workspace / "runs" / "whole", killed)
    log = (killed / "logs" / "rank-00000.log").read_text("utf-8")
    assert re.findall(r"rank 0 of 1|killed: .*to step 40|done at step 40/40", log) == [
        "rank 0 of 1",
        "killed: to step 40",
        "rank 0 of 1",
        "killed: from step 20 to step 40",
        "done at step 40/40",
    ]

    again = llmtrain("train", "run.yaml", "name=killed", folder=workspace)
    assert again.returncode == 0
    assert "already done, all 40 steps. Raise train.steps above 40 to go on." in again.stdout


def sha256_of_state(run: Path) -> str:
    """One hash of every weight and moment of the last checkpoint, by name, in whatever pieces it was saved."""
    reader, digest = open_checkpoint(run / "checkpoints" / "step-00000040"), hashlib.sha256()
    for info in reader.tensors():
        whole = reader.read(info.name, info.kind, Box.whole(info.shape))
        digest.update(f"{info.name} {info.kind} {info.dtype} {info.shape}".encode())
        digest.update(whole.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


RESUMED = [
    ("megatron", 2, "engine.zero_stage=1"),
    ("deepspeed", 2, "engine.zero_stage=3"),
    ("megatron", 1, "parallel.tensor=1"),
    ("deepspeed", 1, "engine.zero_stage=2"),
]


@pytest.mark.whole_grid
@pytest.mark.parametrize(("engine", "num_ranks", "setting"), RESUMED)
def test_three_resumes_at_random_points_change_nothing(
    workspace: Path, engine: str, num_ranks: int, setting: str
) -> None:
    settings = (f"engine.name={engine}", f"launch.num_workers={num_ranks}", setting, "checkpoint.every_steps=3")
    draw = random.Random(f"{engine} {num_ranks}")
    resumed = workspace / "runs" / "resumed"
    for number, stop in enumerate(sorted(draw.sample(range(4, 30), 3))):
        process = start_llmtrain("train", "run.yaml", "name=resumed", *settings, folder=workspace)
        wait_until(lambda stop=stop: last_step(resumed) >= stop, process)
        process.send_signal(signal.SIGTERM if number == 1 else signal.SIGKILL)
        assert process.wait() == (75 if number == 1 else -signal.SIGKILL)
        assert last_step(resumed) < 40
    last = llmtrain("train", "run.yaml", "name=resumed", *settings, folder=workspace)
    assert last.returncode == 0, last.stderr
    whole = llmtrain("train", "run.yaml", "name=whole", *settings, folder=workspace)
    assert whole.returncode == 0, whole.stderr

    assert_same_end(workspace / "runs" / "whole", resumed)
    assert sha256_of_state(resumed) == sha256_of_state(workspace / "runs" / "whole")
    # Equal losses of every step are those of equal samples; that many of them is each of them once.
    state = open_checkpoint(resumed / "checkpoints" / "step-00000040").state
    assert state["train"]["samples"] == 40 * 16


@pytest.mark.whole_grid
def test_told_to_stop_saves_at_the_very_step_and_continues(workspace: Path) -> None:
    process = start_llmtrain("train", "run.yaml", "name=stopped", folder=workspace)
    stopped = workspace / "runs" / "stopped"
    wait_until(lambda: last_step(stopped) >= 7, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 75
    step = last_step(stopped)
    said = (workspace / "output.txt").read_text("utf-8").splitlines()[-1]
    assert said.startswith(f"preempted at step {step}/40") and said.endswith(": saved; the same command continues")
    assert (stopped / "checkpoints" / f"step-{step:08d}").exists()
    status = json.loads((stopped / "status.json").read_text("utf-8"))
    assert (status["status"], status["step"]) == ("preempted", step)

    resumed = llmtrain("train", "run.yaml", "name=stopped", folder=workspace)
    assert resumed.returncode == 0, resumed.stderr
    assert llmtrain("train", "run.yaml", "name=whole", folder=workspace).returncode == 0
    assert_same_end(workspace / "runs" / "whole", stopped)


@pytest.mark.whole_grid
def test_told_twice_stops_at_once(workspace: Path) -> None:
    slow = ("train.micro_batch_size=16", "train.global_batch_size=512", "train.steps=1000")
    process = start_llmtrain("train", "run.yaml", *slow, folder=workspace)
    wait_until(lambda: last_step(workspace / "runs" / "tiny") >= 1, process)
    process.send_signal(signal.SIGTERM)
    wait_until(lambda: "SIGTERM" in (workspace / "output.txt").read_text(), process)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 143


def test_a_used_folder_is_not_used_again_with_resume_none(workspace: Path) -> None:
    short = ("train", "run.yaml", "train.steps=6", "checkpoint.resume=none")
    assert llmtrain(*short, folder=workspace).returncode == 0
    refused = llmtrain(*short, folder=workspace)
    assert refused.returncode == 2
    assert "checkpoint.resume = none" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_another_process_in_the_same_folder_is_refused(workspace: Path) -> None:
    process = start_llmtrain("train", "run.yaml", "train.steps=100000", folder=workspace)
    wait_until(lambda: last_step(workspace / "runs" / "tiny") >= 1, process)
    second = llmtrain("train", "run.yaml", folder=workspace)
    ranks = [child.pid for child in psutil.Process(process.pid).children()]
    process.kill()
    process.wait()
    assert second.returncode == 4
    assert any(f"in use by process {rank}" in second.stderr for rank in ranks)
