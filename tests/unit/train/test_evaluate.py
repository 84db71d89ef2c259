"""An evaluation reads each token once, whatever it is asked for, and alike in every layout."""

from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmtrain.config.data import SourceConfig
from llmtrain.config.schema import RunConfig
from llmtrain.data.loader import BatchLoader, build_stream
from llmtrain.data.row_config import build_row_config
from llmtrain.data.storage.manifest import read_manifest
from llmtrain.data.stream import samples_of_epochs
from llmtrain.engines.torch_engine import TorchEngine
from llmtrain.preflight.resolve import resolve
from llmtrain.preflight.source_use import source_uses
from llmtrain.train.loop import Evaluation
from llmtrain.train.setup import build_loader
from llmtrain.values.batch import IGNORED_LABEL, Batch
from tests.support.datasets import EOS_ID, write_dataset
from tests.support.small_runs import rows_of, small_run, train_here, write_data

SEQ_LEN = 32
VOCAB_SIZE = 2000


def write_source(folder: Path, first: int, lengths: list[int]) -> None:
    """Shards of one document each, in which no token but the end stands twice."""
    shards = []
    for length in lengths:
        shards.append([np.arange(first, first + length)])
        first += length
    write_dataset(folder, shards, vocab_size=VOCAB_SIZE)
    (folder / "tokenizer.model").write_bytes(b"a run copies it and reads no token")


def config_of(folder: Path, valid: list[dict[str, Any]], windows: str, batch: int = 4, micro: int = 1) -> RunConfig:
    return small_run(
        folder,
        model={"vocab_size": VOCAB_SIZE},
        data={"train": valid, "valid": valid, "windows": windows},
        train={"global_batch_size": batch, "micro_batch_size": micro},
        evaluate={"every_steps": 1, "steps": 1000},
    )


@pytest.fixture
def sources(tmp_path: Path) -> list[dict[str, Any]]:
    """A large source and a small one, which are to be read in equal parts."""
    write_source(tmp_path / "large", 10, [230, 90, 410])
    write_source(tmp_path / "small", 1000, [70, 80])
    return [{"path": str(tmp_path / name), "weight": 1} for name in ("large", "small")]


def targets_of(batches: list[Batch]) -> list[int]:
    found = [int(label) for batch in batches for label in batch.labels_BS.flatten()]
    return [label for label in found if label != IGNORED_LABEL]


class Reader:
    """An engine that only reads."""

    def __init__(self) -> None:
        self.batches: list[list[Batch]] = []

    def eval_step(self, micro_batches: list[Batch]) -> Any:
        self.batches.append(micro_batches)
        num_tokens = len(targets_of(micro_batches))
        return type("Result", (), {"loss_sum": float(num_tokens), "num_tokens": num_tokens, "counts": ()})()


@pytest.mark.parametrize("windows", ["continuous", "per_shard"])
def test_no_token_counts_twice(tmp_path: Path, sources: list[dict[str, Any]], windows: str) -> None:
    config, reader = config_of(tmp_path, sources, windows), Reader()
    evaluation = Evaluation(build_loader(resolve(config), "valid", once=True), 1, config.evaluate.steps)
    loss, num_tokens, _ = evaluation.run(reader)  # type: ignore[arg-type]
    whole = sum(samples_of_epochs(read_manifest(source["path"]), SEQ_LEN, windows) for source in sources)  # type: ignore[arg-type]
    targets = targets_of([batch for step in reader.batches for batch in step])
    assert (loss, num_tokens, len(targets)) == (1.0, whole * SEQ_LEN, whole * SEQ_LEN)
    counts = Counter(targets)
    assert counts.pop(EOS_ID, 0) <= 5 and set(counts.values()) == {1}
    tokens = sum(read_manifest(source["path"]).stream_tokens for source in sources)
    assert tokens - num_tokens <= (2 if windows == "continuous" else 5) * SEQ_LEN
    assert any(targets_of(step) for step in reader.batches[-1:]), "the last batch is one that is needed"


@pytest.mark.parametrize("steps", [1, 2])
def test_large_data_is_read_as_before(tmp_path: Path, sources: list[dict[str, Any]], steps: int) -> None:
    config, reader = config_of(tmp_path, sources, "continuous"), Reader()
    Evaluation(build_loader(resolve(config), "valid", once=True), 1, steps).run(reader)  # type: ignore[arg-type]
    endless = build_loader(resolve(config), "valid").steps(0)
    expected = [targets_of(step) for step in islice(endless, steps)]
    assert [targets_of(step) for step in reader.batches] == expected


def test_every_layout_and_batch_size_measures_the_same(tmp_path: Path, sources: list[dict[str, Any]]) -> None:
    """Of two data ranks each has its part; one sample at a time is the plainest way to read the data."""
    config = config_of(tmp_path, sources, "continuous")
    engine = TorchEngine(config, torch.device("cpu"))
    stream = build_stream(config.data.valid, config.data, config.seed, once=True)

    def measured(batch: int, micro: int, dp_size: int) -> tuple[float, int]:
        loss_sum, tokens = 0.0, 0
        for rank in range(dp_size):
            loader = BatchLoader(stream, build_row_config(config, stream, Path), batch, micro, rank, dp_size)
            loss, num_tokens, _ = Evaluation(loader, 1, 1000).run(engine)
            loss_sum, tokens = loss_sum + loss * num_tokens, tokens + num_tokens
        return loss_sum / tokens, tokens

    plain = measured(1, 1, 1)
    for sizes in ((4, 1, 1), (4, 2, 2), (16, 2, 4), (64, 8, 1), (64, 8, 2)):
        loss, tokens = measured(*sizes)
        assert tokens == plain[1] and loss == pytest.approx(plain[0], rel=1e-6), sizes


def test_a_run_counts_the_tokens_of_a_small_validation_set_once(tmp_path: Path) -> None:
    write_data(tmp_path, valid_documents=8)
    config = small_run(tmp_path, train={"steps": 2}, evaluate={"every_steps": 1, "steps": 50})
    assert train_here(config) == 0
    tokens = read_manifest(tmp_path / "valid").stream_tokens
    whole = (tokens - 1) // SEQ_LEN
    assert [row["valid_tokens"] for row in rows_of(config) if "valid_loss" in row] == [whole * SEQ_LEN] * 2
    assert whole < 4 * 50
    (use,) = (use for use in source_uses(resolve(config)) if use.split == "valid")
    assert use.epochs == pytest.approx(whole * SEQ_LEN / tokens)


def test_the_tail_that_reaches_into_the_next_pass_is_left_out(tmp_path: Path) -> None:
    """100 tokens and an end are three samples of 32; the fourth would begin anew."""
    write_source(tmp_path / "one", 10, [100])
    data = config_of(tmp_path, [{"path": str(tmp_path / "one")}], "continuous").data
    once = build_stream((SourceConfig(path=str(tmp_path / "one")),), data, 1, once=True)
    assert once.length_once == 3
    assert [once.sample(number).blank for number in range(6)] == [False] * 3 + [True] * 3
    assert not any(build_stream(data.valid, data, 1).sample(number).blank for number in range(6))
