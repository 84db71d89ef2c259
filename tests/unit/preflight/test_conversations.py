"""Data that does not fit a run on conversations is told before it starts, at the key that could change."""

from pathlib import Path

import numpy as np
import pytest

from llmtrain.config.reading.load import load_config
from llmtrain.preflight.storage import check_storage
from tests.support.datasets import (
    chat_record,
    random_conversations,
    random_documents,
    write_dataset,
    write_target_dataset,
)

RUN = """name: talks
model: {num_layers: 1, hidden_size: 32, num_heads: 2, max_seq_len: 64}
data:
  train: [{path: talks}]
  objective: chat
  seq_len: 40
  cache_dir: cache
train: {steps: 2, global_batch_size: 4, micro_batch_size: 2}
observe: {wandb: off}
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(RUN)
    write_target_dataset(tmp_path / "talks", [random_conversations(30)], chat_record())
    long = np.arange(6, 60)
    write_target_dataset(tmp_path / "long", [[(long, np.ones(len(long)))]], chat_record())
    write_dataset(tmp_path / "plain", [random_documents(30)], tokenizer=b"a run copies it and reads no token")
    return tmp_path


def problems(*overrides: str) -> dict[str, str]:
    found = check_storage(load_config(Path("run.yaml"), overrides).config).problems
    return {problem.key: problem.message for problem in found}


def test_what_fits_has_no_problem() -> None:
    assert problems() == {}
    assert problems("data.seq_len=20", "data.chat.too_long=drop", "data.packing=single") == {}


def test_long_conversations_are_counted_before_the_run() -> None:
    lengths = [len(ids) for ids, _ in random_conversations(30)]
    long = sum(length > 20 for length in lengths)
    found = problems("data.seq_len=20")
    assert list(found) == ["data.chat.too_long"]
    assert (
        f"has {long} documents of more than data.seq_len = 20 tokens, the longest of {max(lengths)}"
        in found["data.chat.too_long"]
    )
    assert f"Set drop, or truncate, or data.seq_len={max(lengths)}." in found["data.chat.too_long"]
    of_valid = problems("data.seq_len=20", "data.valid=[{path: talks}]", "data.chat.too_long=truncate")
    assert of_valid == {}


def test_where_all_are_too_long_none_may_be_dropped() -> None:
    found = problems("data.seq_len=2", "data.chat.too_long=drop")
    assert "has 30 documents of more than data.seq_len = 2 tokens" in found["data.chat.too_long"]
    assert "and none that fits. Set truncate, or data.seq_len=" in found["data.chat.too_long"]
    of_valid = problems("data.valid=[{path: long}]", "data.chat.too_long=drop", "data.packing=single")
    assert "long has 1 document" in of_valid["data.chat.too_long"]


def test_shards_without_spans_are_named() -> None:
    found = problems("data.train=[{path: talks}, {path: plain}]")
    assert "has no trained members, which data.objective = chat needs" in found["data.train.1.path"]
    assert "data.train.0.path" not in found
    assert "`llmtrain data chat`" in problems("data.train=[{path: plain}]")["data.train.0.path"]
