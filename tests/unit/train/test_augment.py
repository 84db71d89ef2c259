"""A run trains on noise, evaluates without, and an interrupted one is one that was not interrupted, bit for bit."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmtrain.config.schema import RunConfig
from llmtrain.data.row_config import PieceTable
from tests.support.datasets import VOCAB_SIZE
from tests.support.small_runs import rows_of, small_run, train_here, write_data

NOISE: dict[str, Any] = {"augment": {"delete_words": 0.2, "replace_words": 0.2}}


@pytest.fixture(autouse=True)
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokenizer of this data cannot be read: a third of its tokens begin a word."""
    write_data(tmp_path)
    ids = np.arange(VOCAB_SIZE)
    table = PieceTable(ids < 4, ids % 3 == 0)
    monkeypatch.setattr("llmtrain.data.row_config.load_pieces", lambda tokenizer: table)


def run_of(folder: Path, name: str, steps: int, **data: Any) -> RunConfig:
    base = {"train": [{"path": str(folder / "train")}], "valid": [{"path": str(folder / "valid")}], "seq_len": 32}
    config = small_run(
        folder,
        data={**base, **data},
        train={"steps": steps},
        evaluate={"every_steps": 3},
        checkpoint={"every_steps": 3},
    )
    return config.with_keys({"name": name, "optim.schedule": "constant"})


def column(config: RunConfig, key: str) -> list[float]:
    return [row[key] for row in rows_of(config) if key in row]


def test_resumed_is_uninterrupted(tmp_path: Path) -> None:
    whole, first, rest = (run_of(tmp_path, name, steps, **NOISE) for name, steps in (("a", 6), ("b", 3), ("b", 6)))
    assert train_here(whole) == train_here(first) == train_here(rest) == 0
    assert column(whole, "loss") == column(rest, "loss")
    files = [config.run_dir / "checkpoints/step-00000006/rank-00000.safetensors" for config in (whole, rest)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_it_is_training_that_has_noise(tmp_path: Path) -> None:
    """With a learning rate of nearly nothing both runs evaluate the same weights."""
    plain, noisy = (
        run_of(tmp_path, name, 6, **keys).with_keys({"optim.lr": 1e-12, "optim.min_lr": 0.0})
        for name, keys in {"plain": dict[str, Any](), "noisy": NOISE}.items()
    )
    assert train_here(plain) == train_here(noisy) == 0
    assert column(plain, "loss") != column(noisy, "loss")
    assert column(plain, "valid_loss") == pytest.approx(column(noisy, "valid_loss"), rel=1e-6)
    assert column(noisy, "tokens")[-1] < column(plain, "tokens")[-1], "what is dropped is no target"
