import sysconfig
from pathlib import Path

import pytest

from tests.support.command import llmtrain

CONFIG = """\
name: tiny
model: {num_layers: 2, hidden_size: 64, num_heads: 4, num_kv_heads: 2, max_seq_len: 64, dropout: 0.1}
data:
  train: [{path: data/train}]
  valid: [{path: data/valid}]
  seq_len: 64
train: {steps: 40, global_batch_size: 16, micro_batch_size: 8}
optim: {lr: 3e-3, warmup_steps: 5}
evaluate: {every_steps: 20, steps: 1}
checkpoint: {every_steps: 20}
observe: {wandb: "off", tensorboard: false}
launch: {threads_per_worker: 1}
"""


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `data/train` and `data/valid`, made by the command from real text."""
    folder = tmp_path_factory.mktemp("shards")
    text = Path(sysconfig.get_path("stdlib")) / "json"
    more = Path(sysconfig.get_path("stdlib")) / "email"
    inputs = (f"{text}/*.py", f"{more}/*.py")
    for arguments in (
        ("data", "tokenizer", *inputs, "tokenizer.model", "--vocab-size", "512"),
        ("data", "shards", *inputs, "data", "--tokenizer", "tokenizer.model", "--valid-fraction", "0.2"),
    ):
        done = llmtrain(*arguments, folder=folder)
        assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def workspace(shards: Path, tmp_path: Path) -> Path:
    """A folder with the data and a run's configuration, `run.yaml`."""
    (tmp_path / "data").symlink_to(shards / "data")
    (tmp_path / "run.yaml").write_text(CONFIG, "utf-8")
    return tmp_path
