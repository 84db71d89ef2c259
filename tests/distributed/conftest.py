from hashlib import sha256
from pathlib import Path

import pytest

from tests.support.datasets import random_documents, write_dataset

CONFIG = """\
name: tiny
model: {num_layers: 2, hidden_size: 32, num_heads: 4, num_kv_heads: 2, max_seq_len: 64, dropout: 0.1}
data:
  train: [{path: data/train}]
  valid: [{path: data/valid}]
  tokenizer: tokenizer.model
  seq_len: 64
  reset_attention: true
train: {steps: 20, global_batch_size: 8, micro_batch_size: 2}
optim: {lr: 3e-3, warmup_steps: 5}
evaluate: {every_steps: 10, steps: 1}
checkpoint: {every_steps: 10}
observe: {wandb: "off", tensorboard: false}
launch: {num_workers: 2, threads_per_worker: 1, max_stalled_attempts: 0}
"""


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """A folder with data sets and the configuration of a run on two ranks, `run.yaml`."""
    return write_workspace(tmp_path)


def write_workspace(folder: Path) -> Path:
    """The same files in any folder, every time."""
    tokenizer = b"a run copies it and reads no token"
    (folder / "tokenizer.model").write_bytes(tokenizer)
    for seed, split in enumerate(("train", "valid")):
        documents = random_documents(200, seed=seed, longest=90)
        write_dataset(folder / "data" / split, [documents], tokenizer_sha256=sha256(tokenizer).hexdigest())
    (folder / "run.yaml").write_text(CONFIG, "utf-8")
    return folder
