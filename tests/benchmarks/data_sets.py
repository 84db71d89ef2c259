"""Data sets for benchmarks: text that every machine has, and shards of random tokens as large as real ones."""

import sysconfig
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipelines.dataset_writer import ShardingConfig, ShardWriter
from data_pipelines.reading.documents import iter_documents
from data_pipelines.reading.inputs import ReadReport
from data_pipelines.sharding import write_shards
from data_pipelines.tokenizer import train_tokenizer
from llmtrain.data.storage.manifest import DTYPES, SCHEMA_VERSION, Manifest, ShardEntry, dtype_name, write_manifest

TOKENIZER = "tokenizer.model"
EOS_ID = 0


def standard_library_text(num_documents: int | None = None) -> list[str]:
    """Modules of the Python standard library as text, in order of their names."""
    pattern = Path(sysconfig.get_path("stdlib")) / "*.py"
    return list(islice(iter_documents([str(pattern)], ReadReport()), num_documents))


def write_text_data_set(folder: Path, vocab_size: int, num_documents: int) -> Path:
    """A tokenizer of its own and shards of the standard library's text; returns the training split's folder."""
    documents = standard_library_text(num_documents)
    tokenizer = train_tokenizer(documents, folder / TOKENIZER, vocab_size)
    write_shards(documents, folder / "data", tokenizer, ShardingConfig())
    return folder / "data" / "train"


def random_documents(num_tokens: int, mean_tokens: int, vocab_size: int, seed: int = 0) -> Iterator[NDArray[Any]]:
    """Documents of random ids, about `num_tokens` in all, with log-normal lengths; the same in every call."""
    rng = np.random.default_rng(seed)
    dtype = DTYPES[dtype_name(vocab_size)]
    spread = 0.9
    while num_tokens > 0:
        length = int(np.clip(rng.lognormal(np.log(mean_tokens) - spread**2 / 2, spread), 16, 16 * mean_tokens))
        yield rng.integers(1, vocab_size, length, dtype=dtype)
        num_tokens -= length


def write_random_data_set(folder: Path, num_shards: int, shard_tokens: int, mean_tokens: int, vocab_size: int) -> Path:
    """Shards of random documents with index and manifest; returns `folder`."""
    folder.mkdir(parents=True)
    shards = [
        write_random_shard(
            folder, number, random_documents(shard_tokens, mean_tokens, vocab_size, seed=number), vocab_size
        )
        for number in range(num_shards)
    ]
    manifest = Manifest(SCHEMA_VERSION, "0" * 64, vocab_size, dtype_name(vocab_size), EOS_ID, tuple(shards))
    write_manifest(folder, manifest)
    return folder


def write_random_shard(folder: Path, number: int, documents: Iterator[NDArray[Any]], vocab_size: int) -> ShardEntry:
    writer = ShardWriter(folder, f"shard-{number:06d}", DTYPES[dtype_name(vocab_size)])
    for key, ids in enumerate(documents):
        writer.add(f"{key:09d}", ids)
    return writer.finish()
