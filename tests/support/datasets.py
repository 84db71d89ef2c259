"""Small data sets that tests write and then read, spoil or compare."""

from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_pipelines.dataset_writer import ShardWriter
from llmtrain.data.storage.manifest import DTYPES, SCHEMA_VERSION, Manifest, dtype_name, write_manifest

EOS_ID = 3
VOCAB_SIZE = 300

Documents = Sequence[NDArray[np.int64]]


def random_documents(count: int, seed: int = 0, longest: int = 40) -> list[NDArray[np.int64]]:
    """Documents of 0 to `longest` tokens."""
    generator = np.random.default_rng(seed)
    return [generator.integers(4, VOCAB_SIZE, length) for length in generator.integers(0, longest + 1, count)]


UNREAD_TOKENIZER = b"a run copies it and reads no token"


def write_dataset(
    folder: Path,
    shards: Sequence[Documents],
    vocab_size: int = VOCAB_SIZE,
    tokenizer_sha256: str = "0" * 64,
    tokenizer: bytes | None = None,
) -> Manifest:
    """Write documents as shards with sidecars and manifest, and the tokenizer that a run is to find there."""
    folder.mkdir(parents=True, exist_ok=True)
    if tokenizer is not None:
        (folder / "tokenizer.model").write_bytes(tokenizer)
        tokenizer_sha256 = sha256(tokenizer).hexdigest()
    dtype = dtype_name(vocab_size)
    entries = []
    for number, documents in enumerate(shards):
        writer = ShardWriter(folder, f"shard-{number:06d}", DTYPES[dtype])
        for key, document in enumerate(documents):
            writer.add(f"{key:09d}", document)
        entries.append(writer.finish())
    manifest = Manifest(SCHEMA_VERSION, tokenizer_sha256, vocab_size, dtype, EOS_ID, tuple(entries))
    write_manifest(folder, manifest)
    return manifest


def token_stream(documents: Documents) -> NDArray[np.int64]:
    """The slow reference: every document followed by one end of sequence."""
    return np.concatenate([np.append(document, EOS_ID) for document in documents])
