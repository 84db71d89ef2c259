"""A run's YAML file and the data sets that it names, small and on storage."""

import json
from hashlib import sha256
from pathlib import Path

from llmtrain.data.storage.manifest import Manifest, ShardEntry, write_manifest
from tests.support.datasets import UNREAD_TOKENIZER

GOOD_RUN = """\
name: small
model:
  num_layers: 2
  hidden_size: 64
  num_heads: 4
  max_seq_len: 128
data:
  train: [{path: shards/train}]
  seq_len: 64
train:
  steps: 10
  global_batch_size: 8
  micro_batch_size: 4
"""


def write_good_run(folder: Path) -> Path:
    """A run that passes every check when the working directory is `folder`."""
    write_data_set(folder / "shards" / "train")
    file = folder / "run.yaml"
    file.write_text(GOOD_RUN, encoding="utf-8")
    return file


def write_data_set(
    folder: Path, tokens: int = 1000, vocab_size: int = 300, tokenizer_sha256: str | None = None
) -> Path:
    """A data set's manifest and its tokenizer, which is all that checks before a run read."""
    folder.mkdir(parents=True)
    if tokenizer_sha256 is None:
        (folder.parent / "tokenizer.model").write_bytes(UNREAD_TOKENIZER)
        tokenizer_sha256 = sha256(UNREAD_TOKENIZER).hexdigest()
    shard = ShardEntry("shard-00000.tar", 1, "0" * 64, "shard-00000.idx", "0" * 64, samples=10, tokens=tokens)
    write_manifest(folder, Manifest(1, tokenizer_sha256, vocab_size, "uint16", 0, (shard,)))
    return folder


def replace_tokenizer(run: Path, tokenizer: bytes) -> None:
    """A run folder as if it had been trained with a sentencepiece model."""
    for manifest in run.glob("checkpoints/*/manifest.json"):
        content = json.loads(manifest.read_text())
        content["about"]["data"] = {"tokenizer_sha256": sha256(tokenizer).hexdigest()}
        manifest.write_text(json.dumps(content))
        told = sha256(manifest.read_bytes()).hexdigest()
        manifest.with_name("manifest.json.sha256").write_text(f"{told}  manifest.json\n")
    (run / "tokenizer.model").write_bytes(tokenizer)


def contents(run: Path) -> dict[str, str]:
    """The hash of each file that a run writes, by its path in the run folder; logs, which only grow, left out."""
    files = [file for file in run.rglob("*") if file.is_file() and "logs" not in file.parts]
    return {str(file.relative_to(run)): sha256(file.read_bytes()).hexdigest() for file in sorted(files)}
