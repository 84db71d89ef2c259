"""Conversations from files to a model that answers, by the commands as a user calls them."""

import json
from pathlib import Path

import pytest

from tests.support.command import llmtrain

RUN = """name: talks
output_dir: runs
model: {num_layers: 2, hidden_size: 64, num_heads: 4, max_seq_len: 64}
data: {train: [{path: out/train}], objective: chat, seq_len: 64, cache_dir: cache}
train: {steps: 80, global_batch_size: 4, micro_batch_size: 2}
optim: {lr: 5e-3, warmup_steps: 5}
observe: {wandb: off, tensorboard: false, log_every_steps: 40}
launch: {threads_per_worker: 1}
"""
FACTS = {"What is grass?": "green", "What is snow?": "white", "What is coal?": "black", "Who are you?": "a parrot"}


@pytest.mark.whole_grid
def test_a_model_learns_to_answer_and_its_export_answers_alike(tmp_path: Path) -> None:
    lines = [json.dumps({"prompt": question, "completion": answer}) for question, answer in FACTS.items()]
    (tmp_path / "facts.jsonl").write_text("\n".join(lines))
    (tmp_path / "text.txt").write_text(
        "".join(f"user {question} assistant {answer}\n" for question, answer in FACTS.items()) * 9
    )
    (tmp_path / "run.yaml").write_text(RUN)
    model = ("--tokenizer", "t.model", "--template", "chatml", "--valid-fraction", "0")
    commands = [
        ("data", "tokenizer", "text.txt", "t.model", "--vocab-size", "320", "--control-pieces", "4"),
        ("data", "chat", "facts.jsonl", "out", *model),
        ("train", "run.yaml"),
        ("export", "runs/talks", "export", "--to", "hf"),
    ]
    for command in commands:
        done = llmtrain(*command, folder=tmp_path)
        assert done.returncode == 0, done.stderr
    for place in ("runs/talks", "export"):
        for question in list(FACTS)[1:3]:
            done = llmtrain("generate", place, "--prompt", question, "--chat", "--temperature", "0", folder=tmp_path)
            assert done.stdout.strip() == FACTS[question], (place, question, done.stdout, done.stderr)


@pytest.mark.whole_grid
def test_new_tokens_of_a_model_that_had_none(tmp_path: Path) -> None:
    """A base whose tokenizer has no reserved pieces: its vocabulary grows in one step, and its export knows them."""
    lines = [json.dumps({"prompt": question, "completion": answer}) for question, answer in FACTS.items()]
    (tmp_path / "facts.jsonl").write_text("\n".join(lines))
    (tmp_path / "text.txt").write_text("".join(f"{question} {answer}\n" for question, answer in FACTS.items()) * 30)
    base = RUN.replace("name: talks", "name: base").replace("objective: chat, seq_len: 64", "seq_len: 32")
    (tmp_path / "base.yaml").write_text(base.replace("out/train", "plain/train").replace("80", "20"))
    (tmp_path / "run.yaml").write_text(RUN + "finetune: {base: runs/base}\n")
    model = ("--tokenizer", "t.model", "--valid-fraction", "0")
    for command in (
        ("data", "tokenizer", "text.txt", "t.model", "--vocab-size", "300"),
        ("data", "shards", "text.txt", "plain", *model),
        ("train", "base.yaml"),
        ("data", "chat", "facts.jsonl", "out", *model, "--template", "chatml", "--grow"),
        ("train", "run.yaml"),
        ("export", "runs/talks", "export", "--to", "hf"),
    ):
        done = llmtrain(*command, folder=tmp_path)
        assert done.returncode == 0, (command, done.stderr)
    assert json.loads((tmp_path / "export" / "config.json").read_text())["vocab_size"] == 302
    for place in ("runs/talks", "export"):
        done = llmtrain("generate", place, "--prompt", "What is snow?", "--chat", "--temperature", "0", folder=tmp_path)
        assert done.stdout.strip() == "white", (place, done.stdout, done.stderr)
