"""Small data sets that tests write and then read, spoil or compare."""

from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_pipelines.dataset_writer import ShardWriter
from llmtrain.data.storage.manifest import DTYPES, SCHEMA_VERSION, Manifest, dtype_name, write_manifest
from llmtrain.data.storage.targets import ChatRecord, LabelsRecord

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


def write_target_dataset(
    folder: Path,
    shards: Sequence[Sequence[tuple[NDArray[np.int64], NDArray[np.int64]]]],
    record: ChatRecord | LabelsRecord,
    tokenizer: bytes = UNREAD_TOKENIZER,
) -> Manifest:
    """Write documents with a second member each: pairs of ids and spans, or labels."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(tokenizer)
    dtype, entries = dtype_name(VOCAB_SIZE), []
    kind = "trained" if isinstance(record, ChatRecord) else "labels"
    for number, documents in enumerate(shards):
        writer = ShardWriter(folder, f"shard-{number:06d}", DTYPES[dtype], kind)
        for key, (document, targets) in enumerate(documents):
            writer.add(f"{key:09d}", document, targets)
        entries.append(writer.finish())
    plain = Manifest(SCHEMA_VERSION, sha256(tokenizer).hexdigest(), VOCAB_SIZE, dtype, EOS_ID, tuple(entries))
    chat, labels = (record, None) if isinstance(record, ChatRecord) else (None, record)
    manifest = replace(plain, targets=kind, chat=chat, labels=labels)
    write_manifest(folder, manifest)
    return manifest


LABELS = LabelsRecord("classification", ("a", "b", "c"), separator_id=3)
"""Of pairs of texts."""

END_ID = 5
"""Ends a turn."""


def chat_record(**counts: int) -> ChatRecord:
    template = "a template"
    return ChatRecord(template, sha256(template.encode()).hexdigest(), (END_ID,), counts or {"assistant": 1})


def random_conversations(
    count: int, seed: int = 0, longest: int = 40
) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Conversations of up to `longest` tokens whose answers end with END_ID, and the spans of those."""
    generator = np.random.default_rng(seed)
    found = []
    for length in generator.integers(6, longest + 1, count):
        ids = generator.integers(6, VOCAB_SIZE, length)
        cuts = np.sort(generator.choice(np.arange(1, length), 4 if length > 12 else 2, replace=False))
        spans = cuts.reshape(-1, 2)
        ids[spans[:, 1] - 1] = END_ID
        found.append((ids, spans))
    return found


def token_stream(documents: Documents) -> NDArray[np.int64]:
    """The slow reference: every document followed by one end of sequence."""
    return np.concatenate([np.append(document, EOS_ID) for document in documents])
