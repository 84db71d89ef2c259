"""The stages `tokens`, `order` and `shards`: ids of each chunk, where each document goes, and the files that come out.

A document has a key: drawn by the seed where documents are shuffled, else its place among the inputs. Documents in the
order of their keys are cut into shards, so a shard is a range of keys, and its task finds its documents alone.
"""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipelines.cutting import tokenized
from data_pipelines.dataset_writer import ShardWriter, bos_ids_of
from data_pipelines.pipeline.stages.document_files import kept_documents, row_id
from data_pipelines.pipeline.stages.sidecars import drawn_key
from data_pipelines.pipeline.work import DataTask, Output, Workspace
from data_pipelines.sharding import bound_between, place_of, splits_of
from llmtrain.data.storage.manifest import DTYPES, dtype_name
from llmtrain.data.tokenizer import load_tokenizer
from llmtrain.errors import ConfigError
from llmtrain.values.tokenizer import Tokenizer

TOKENS, ROWS, TAR, INDEX = ".tokens", ".rows", ".tar", ".idx"
PLACES = 2.0**64
ROW = np.dtype([("key", "<u8"), ("place", "<u8"), ("offset", "<u8"), ("tokens", "<u8")])
"""What is known of a document: the key of its order, its place between the splits, and its ids in the file of them."""

TRAINED = DataTask("tokenizer", 0)


def tokenizer_path(work: Workspace) -> Path:
    """The tokenizer's file. Raises DamagedWorkError where one was trained and is damaged."""
    tokenizer = work.config.tokenizer
    assert tokenizer is not None
    if tokenizer.train is None:
        return Path(str(tokenizer.path))
    return work.checked(TRAINED, ".json" if tokenizer.train.kind == "byte_bpe" else ".model")


@lru_cache(maxsize=1)
def _loaded(path: Path) -> Tokenizer:
    return load_tokenizer(path)


def write_tokens(work: Workspace, task: DataTask, output: Output) -> dict[str, Any]:
    """The ids of a chunk's documents, one after another, and a row for each in the order of their keys."""
    tokenizer = _loaded(tokenizer_path(work))
    last = len(work.program.segments) - 1
    rows: list[tuple[int, int, int, int]] = []
    texts: list[int] = []

    def documents():
        for found in kept_documents(work, last, task.number):
            document, own = found.document, row_id(task.number, found.row)
            key = drawn_key(work.config.seed, document.id, b"shuffle") if work.config.write.shuffle else own
            texts.append(len(document.text.encode()))
            yield (key, place_of(document.text)), document.text

    offset = 0
    with output.file(TOKENS) as file:
        for (key, place), ids in tokenized(documents(), tokenizer):
            file.write(ids.tobytes())
            rows.append((key, place, offset, len(ids)))
            offset += len(ids)
    table = np.array(rows, ROW)
    with output.file(ROWS) as file:
        file.write(table[np.argsort(table["key"], kind="stable")].tobytes())
    source = work.plan.chunks[task.number].source
    return {"source": source, "documents": len(rows), "tokens": offset, "bytes": sum(texts)}


def _rows(work: Workspace, chunk: int) -> NDArray[Any]:
    path = work.checked(DataTask("tokens", chunk), ROWS)
    return np.memmap(path, ROW, "r") if path.stat().st_size else np.empty(0, ROW)


@dataclass(frozen=True)
class ShardRange:
    """A shard before it is written: its split, its keys from begin to end, and the number of its first document."""

    split: str
    begin: int
    end: int
    first: int


def write_order(work: Workspace, task: DataTask, output: Output) -> dict[str, Any]:
    """Cut all documents, in the order of their keys, into shards. About 60 bytes a document are held.

    Raises ConfigError where a split would be empty.
    """
    columns = ("key", "place", "tokens")
    parts = [{name: _rows(work, chunk)[name] for name in columns} for chunk in range(len(work.plan.chunks))]
    keys, places, tokens = (np.concatenate([part[name] for part in parts]) for name in columns)
    fraction = work.config.write.valid_fraction
    splits = splits_of(fraction)
    if len(keys) < len(splits) or (len(splits) == 2 and places.min() == places.max()):
        raise ConfigError(
            f"{len(keys)} documents are left of all inputs, too few for {' and '.join(splits)}. The lines above say "
            "what the steps drop; write.valid_fraction=0 makes no valid."
        )
    bound = fraction * PLACES
    if fraction:
        bound = bound_between(int(places.min()), int(places.max()), bound)
    bos = len(bos_ids_of(_loaded(tokenizer_path(work)), work.config.write.bos))
    in_valid = places < np.uint64(bound)
    shards: list[ShardRange] = []
    for split in splits:
        chosen = in_valid if split == "valid" else ~in_valid
        order = np.argsort(keys[chosen], kind="stable")
        ranges = _ranges(keys[chosen][order], tokens[chosen][order] + np.uint64(bos), work.config.write.shard_tokens)
        shards += [ShardRange(split, *found) for found in ranges]
    return {"bound": bound, "shards": len(shards), "ranges": [[s.split, s.begin, s.end, s.first] for s in shards]}


def _ranges(keys: NDArray[np.uint64], tokens: NDArray[np.uint64], shard_tokens: int) -> list[tuple[int, int, int]]:
    """Begin and end of the keys of each shard, and the number of its first document.

    A shard ends with the document that reaches `shard_tokens`, and documents of equal keys stay together.
    """
    ranges: list[tuple[int, int, int]] = []
    ends = np.cumsum(tokens)
    first, before = 0, 0
    while first < len(keys):
        last = min(int(np.searchsorted(ends, before + shard_tokens)), len(keys) - 1)
        following = int(np.searchsorted(keys, keys[last], side="right"))
        end = int(keys[following]) if following < len(keys) else 1 << 64
        ranges.append((int(keys[first]), end, first))
        before, first = int(ends[following - 1]), following
    return ranges


def write_shard(work: Workspace, task: DataTask, output: Output) -> dict[str, Any]:
    """Write one tar and its sidecar; the counters are the manifest's entry."""
    order = work.require_done(DataTask("order", 0)).counters
    shard = ShardRange(*order["ranges"][task.number])
    tokenizer = _loaded(tokenizer_path(work))
    dtype = DTYPES[dtype_name(tokenizer.vocab_size)]
    bos = np.array(bos_ids_of(tokenizer, work.config.write.bos), dtype)
    chosen, chunks = [np.empty(0, ROW)], [np.empty(0, np.int64)]
    for chunk in range(len(work.plan.chunks)):
        rows = _rows(work, chunk)
        begin = np.searchsorted(rows["key"], np.uint64(shard.begin))
        end = len(rows) if shard.end == 1 << 64 else np.searchsorted(rows["key"], np.uint64(shard.end))
        found = np.array(rows[begin:end])
        found = found[(found["place"] < np.uint64(order["bound"])) == (shard.split == "valid")]
        chosen.append(found)
        chunks.append(np.full(len(found), chunk))
    rows, places = np.concatenate(chosen), np.concatenate(chunks)
    writer = ShardWriter(output.folder, f".{output.stem}", dtype)
    try:
        # Stable: of equal keys the document of the first chunk comes first, and within a chunk they are in order.
        for number, place in enumerate(np.argsort(rows["key"], kind="stable").tolist()):
            row = rows[place]
            path = work.checked(DataTask("tokens", int(places[place])), TOKENS)
            stored = _mapped(path, dtype.str, path.stat().st_mtime_ns)
            ids = stored[int(row["offset"]) : int(row["offset"]) + int(row["tokens"])]
            writer.add(f"{shard.first + number:09d}", np.concatenate([bos, ids]) if len(bos) else ids)
        entry = writer.finish()
    except BaseException:
        writer.abandon()
        raise
    output.adopt(TAR, output.folder / entry.file)
    output.adopt(INDEX, output.folder / entry.index_file)
    return {"split": shard.split, "samples": entry.samples, "tokens": entry.tokens}


@lru_cache(maxsize=4096)
def _mapped(path: Path, dtype: str, changed: int) -> NDArray[Any]:
    """The ids of a chunk, which lie on the disk. The last ones that were looked at stay mapped."""
    return np.memmap(path, dtype, "r") if path.stat().st_size else np.empty(0, dtype)
