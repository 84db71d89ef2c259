"""Whole runs in this process, on one rank, as the launcher runs them: seconds, without a process of their own."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from launch.rank.place import Rank
from launch.rank.signals import StopSignal
from launch.rank.worker import run_worker
from llmtrain.config.schema import RunConfig
from llmtrain.preflight.resolve import resolve
from llmtrain.runs.metrics_file import read_rows
from llmtrain.train.loop import Run
from tests.support.datasets import UNREAD_TOKENIZER, VOCAB_SIZE, random_documents, write_dataset

ChangeRun = Callable[[Run, Rank], Run]


def write_data(folder: Path, valid_documents: int = 40) -> None:
    """Training and validation data, whose tokenizer no run reads."""
    for name, count, seed in (("train", 200, 0), ("valid", valid_documents, 1)):
        write_dataset(folder / name, [random_documents(count, seed)], tokenizer=UNREAD_TOKENIZER)


def small_run(folder: Path, **sections: dict[str, Any]) -> RunConfig:
    """A run on the data of `write_data` in `folder`; sections are merged into a small configuration."""
    base: dict[str, dict[str, Any]] = {
        "model": {"num_layers": 1, "hidden_size": 16, "num_heads": 2, "vocab_size": VOCAB_SIZE, "max_seq_len": 32},
        "data": {"train": [{"path": str(folder / "train")}], "valid": [{"path": str(folder / "valid")}], "seq_len": 32},
        "train": {"steps": 12, "global_batch_size": 4, "micro_batch_size": 2},
        "evaluate": {"every_steps": 0, "steps": 2},
        "checkpoint": {"every_steps": 4, "async_save": False},
        "observe": {"wandb": "off", "tensorboard": False},
        "launch": {"device": "cpu", "threads_per_worker": 1},
    }
    merged = {name: {**base.get(name, {}), **sections.get(name, {})} for name in {**base, **sections}}
    return RunConfig.model_validate({"name": "small", "output_dir": str(folder / "runs"), **merged})


def train_here(config: RunConfig, change_run: ChangeRun | None = None, stop: StopSignal | None = None) -> int:
    """Train or continue a run; returns its exit code, or raises what ends it."""
    return run_worker(resolve(config), stop or StopSignal(), change_run=change_run)


def rows_of(config: RunConfig) -> list[dict[str, Any]]:
    """The rows of a run that count."""
    return read_rows(config.run_dir / "metrics.jsonl")
