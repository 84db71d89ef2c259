"""What follows from a configuration and its data is derived once in a process, whatever the process then does."""

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import launch.rank.worker  # noqa: F401  # whoever has a name of what is counted must be there before it is
import llmtrain.engines.torch_engine
import llmtrain.preflight.dry_run
import llmtrain.preflight.storage  # noqa: F401
from llmtrain.cli import main
from llmtrain.config.reading.load import load_config
from llmtrain.config.schema import RunConfig
from llmtrain.data.storage.manifest import parse_manifest
from llmtrain.errors import DataError
from llmtrain.parallel.layout import plan_layout
from llmtrain.preflight.resolve import fill_vocabulary, resolve
from llmtrain.runs.metrics_file import read_rows
from tests.support.datasets import UNREAD_TOKENIZER, VOCAB_SIZE, random_documents, write_dataset
from tests.support.small_runs import train_here

RUN = """
name: small
model: {num_layers: 1, hidden_size: 16, num_heads: 2, max_seq_len: 64}
data:
  train: [{path: one}, {path: two}, {path: one, weight: 2}]
  valid: [{path: two}, {path: three}]
  seq_len: 32
train: {steps: 2, global_batch_size: 4, micro_batch_size: 2}
evaluate: {every_steps: 1, steps: 1}
checkpoint: {every_steps: 2, async_save: false}
observe: {wandb: off, tensorboard: false}
launch: {device: cpu, threads_per_worker: 1, max_stalled_attempts: 0}
"""
"""On a single rank that is not watched over: command and rank are one process."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("one", "two", "three")):
        write_dataset(tmp_path / name, [random_documents(60, seed)], tokenizer=UNREAD_TOKENIZER)
    (tmp_path / "run.yaml").write_text(RUN)
    return tmp_path


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often manifests are parsed, by the folder's name, and what follows from them is derived.

    Engines are left out: they plan their layout by the group of ranks that they find themselves in.
    """
    count: Counter[str] = Counter()

    def counting(function: Callable[..., Any], name_of: Callable[..., str]) -> None:
        def counted(*args: Any, **keywords: Any) -> Any:
            count[name_of(*args)] += 1
            return function(*args, **keywords)

        for name, module in [*sys.modules.items()]:
            if vars(module).get(function.__name__) is function and not name.startswith("llmtrain.engines."):
                monkeypatch.setattr(module, function.__name__, counted)

    counting(parse_manifest, lambda content, location: Path(location).parent.name)
    counting(plan_layout, lambda *args: "layout")
    counting(fill_vocabulary, lambda *args: "vocabulary")
    return count


EACH_ONCE = {"one": 1, "two": 1, "three": 1, "layout": 1, "vocabulary": 1}


def command(*overrides: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["train", "run.yaml", *overrides])
    assert ended.value.code in (0, None)


def test_a_start_and_a_resume_derive_everything_once(folder: Path, counted: Counter[str]) -> None:
    """Check, vocabulary, start, records and loaders, in one process. A source that is named twice counts once."""
    command()
    assert counted == EACH_ONCE
    counted.clear()
    command("train.steps=4")
    assert counted == EACH_ONCE
    assert [row["step"] for row in read_rows(Path("runs/small/metrics.jsonl")) if "loss" in row] == [1, 2, 3, 4]


def test_a_dry_run_derives_everything_once(folder: Path, counted: Counter[str]) -> None:
    command("--dry-run")
    assert counted == EACH_ONCE


def test_a_rank_looks_for_itself_and_once(folder: Path, counted: Counter[str]) -> None:
    """It gets what the launcher has filled in, and reads manifests of its own."""
    config = resolve(small()).config
    counted.clear()
    assert train_here(config) == 0
    assert counted + Counter(vocabulary=1) == EACH_ONCE
    (folder / "three/manifest.json").write_text("{}")
    with pytest.raises(DataError, match=r"three/manifest\.json"):
        train_here(config)


def small() -> RunConfig:
    return load_config(Path("run.yaml")).config


def test_what_it_holds(folder: Path) -> None:
    asked = small()
    resolved = resolve(asked)
    assert resolved.asked == asked and asked.model.vocab_size is None and asked.data.windows is None
    assert resolved.config == asked.with_keys({"model.vocab_size": VOCAB_SIZE, "data.windows": "continuous"})
    assert [found.stream_tokens for found in resolved.train] == [resolved.train[i].stream_tokens for i in (2, 1, 0)]
    assert resolved.train[1] == resolved.valid[0] != resolved.valid[1]
    assert resolved.layout == plan_layout(asked.parallel, 1) and resolved.layout is resolved.layout
    assert resolved.lengths.main == 32
    assert resolved.run_dir == Path("runs/small")
    assert resolved.tokenizer.read_bytes() == UNREAD_TOKENIZER
