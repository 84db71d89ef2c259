"""`train.tokens` and `train.epochs` through the command: another batch size on resume, a longer budget, and a run that
has had its own."""

import json
from pathlib import Path

import pytest

from llmtrain.runs.metrics_file import read_rows
from tests.support.command import llmtrain

STEP = 16 * 64
"""Tokens of data of a step of `run.yaml`."""


def train(workspace: Path, tokens: int, *options: str) -> str:
    budget = ("train.steps=null", f"train.tokens={tokens}", "evaluate.every_steps=0", "checkpoint.every_steps=0")
    done = llmtrain("train", "run.yaml", *budget, *options, folder=workspace)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_tokens_seen_count_whatever_the_batch_size_was(workspace: Path) -> None:
    run = workspace / "runs" / "tiny"
    train(workspace, 10 * STEP)
    train(workspace, 20 * STEP, "train.global_batch_size=32")
    status = json.loads((run / "status.json").read_text("utf-8"))
    assert (status["status"], status["step"], status["total_steps"]) == ("done", 15, 15)
    rows = read_rows(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 16))
    assert rows[-1]["lr"] == pytest.approx(3e-5)  # min_lr, at the budget's last token

    state = json.loads((run / "checkpoints" / "step-00000015" / "state.json").read_text("utf-8"))["train"]
    assert (state["data_tokens"], state["samples"]) == (20 * STEP, 20 * 16)

    said = train(workspace, 20 * STEP, "train.global_batch_size=8")
    assert (
        "already done, 20480 tokens in 15 steps, and train.tokens asks for 20480. Raise train.tokens above 20480"
        in said
    )
    assert len(read_rows(run / "metrics.jsonl")) == 15


def test_the_dry_run_says_where_the_budget_ends(workspace: Path) -> None:
    train(workspace, 10 * STEP)
    options = ("train.steps=null", f"train.tokens={20 * STEP}", "train.global_batch_size=32", "--dry-run", "--json")
    outline = json.loads(llmtrain("train", "run.yaml", *options, folder=workspace).stdout)
    assert (outline["steps"], outline["tokens"], outline["continues"]["step"]) == (15, 20 * STEP, 10)


def test_epochs_of_the_data_end_where_its_samples_do(workspace: Path) -> None:
    """The ranks, who read the run again for themselves, see the same length; so does a resume with more epochs."""
    run, tokens = workspace / "runs" / "tiny", json.loads((workspace / "data" / "train" / "manifest.json").read_text())
    stream = sum(shard["tokens"] + shard["samples"] for shard in tokens["shards"])
    rare = ("train.steps=null", "evaluate.every_steps=0", "checkpoint.every_steps=0")
    for epochs, size in ((1, 256), (2, 512)):
        asked = (*rare, f"train.epochs={epochs}", f"train.global_batch_size={size}", "launch.num_workers=2")
        done = llmtrain("train", "run.yaml", *asked, folder=workspace)
        assert done.returncode == 0, done.stderr
        state = json.loads(sorted(run.glob("checkpoints/*/state.json"))[-1].read_text("utf-8"))["train"]
        assert 0 <= state["samples"] - (epochs * stream - 1) // 64 < size
    assert "train.epochs = 2 are" in llmtrain("train", "run.yaml", *asked, folder=workspace).stdout
