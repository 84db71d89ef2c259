"""Shards to packed batches [8, 2048] on one core, beside the stock webdataset library and raw memory-mapped tokens."""

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from webdataset.compat import WebDataset
from webdataset.writer import TarWriter

from llmtrain.config.data import DataConfig
from llmtrain.data.loader import BatchLoader, build_stream
from llmtrain.data.row_config import RowConfig
from llmtrain.data.storage.manifest import read_manifest
from tests.benchmarks.data_sets import random_documents, write_random_data_set
from tests.benchmarks.measuring import Measurement, Options, Table, measure, one_core

VOCAB_SIZE = 50_000
MEAN_TOKENS = 600
OURS = "llmtrain"


@dataclass(frozen=True)
class Size:
    """Tokens of the data set, and of a batch."""

    num_tokens: int
    batch_size: int = 8
    seq_len: int = 2048

    @property
    def batch_tokens(self) -> int:
        return self.batch_size * self.seq_len


def benchmark(options: Options) -> list[Table]:
    """Tokens per second over one pass, from files in the page cache."""
    size = Size(num_tokens=100_000, batch_size=2, seq_len=128) if options.quick else Size(num_tokens=12_000_000)
    with tempfile.TemporaryDirectory() as folder, one_core():
        root = Path(folder)
        shards = write_random_data_set(root / "shards", 4, size.num_tokens // 4, MEAN_TOKENS, VOCAB_SIZE)
        arrays = write_numpy_shard(root / "arrays.tar", size.num_tokens)
        flat = write_flat_file(root / "tokens.bin", size.num_tokens)
        tars = sorted(map(str, shards.glob("*.tar")))
        contenders: dict[str, Measurement] = {
            OURS: tokens_per_second(lambda: our_batches(shards, size, "first"), size),
            "llmtrain, shards not hashed": tokens_per_second(lambda: our_batches(shards, size, "off"), size),
            "webdataset, undecoded": tokens_per_second(lambda: packed(stored_tokens(tars), size), size),
            "webdataset, decoded": tokens_per_second(lambda: packed(decoded_tokens([arrays]), size), size),
            "raw mmap": tokens_per_second(lambda: flat_batches(flat, size), size),
        }
        rows = measure(contenders, options.rounds)
    note = (
        "llmtrain shuffles, makes tokens, labels and positions, and hashes each shard before its first use; webdataset "
        "reads in order, and raw mmap cuts one flat file at random places, both without positions"
    )
    title = f"Packed stream, [{size.batch_size}, {size.seq_len}] batches on one core"
    return [Table(title, "tokens/s", "higher", OURS, rows, (note,))]


def tokens_per_second(batches: Callable[[], Iterator[Any]], size: Size) -> Measurement:
    """One pass, from opening the files on."""

    def run() -> float:
        started = time.perf_counter()
        num_batches = sum(1 for _ in batches())
        return num_batches * size.batch_tokens / (time.perf_counter() - started)

    return run


def our_batches(folder: Path, size: Size, verify: str) -> Iterator[Any]:
    """The loader as a run uses it, its thread included."""
    data = DataConfig.model_validate({"train": [{"path": str(folder)}], "seq_len": size.seq_len, "verify": verify})
    stream = build_stream(data.train, data, seed=0)
    loader = BatchLoader(stream, RowConfig(data, 0, stream.eos_id), size.batch_size, size.batch_size)
    steps = loader.steps(first_sample=0)
    yield from islice(steps, read_manifest(folder).num_windows(size.seq_len) // size.batch_size)
    steps.close()


def write_numpy_shard(path: Path, num_tokens: int) -> str:
    """The same kind of documents the way the library's own writer stores arrays."""
    with TarWriter(str(path)) as writer:
        for number, ids in enumerate(random_documents(num_tokens, MEAN_TOKENS, VOCAB_SIZE)):
            writer.write({"__key__": f"{number:09d}", "tokens.npy": ids})
    return str(path)


def stored_tokens(tars: list[str]) -> Iterator[NDArray[Any]]:
    """Our own shards through the stock library; the payload is viewed as ids, nothing is decoded."""
    for sample in WebDataset(tars, shardshuffle=False, empty_check=False):
        yield np.frombuffer(sample["bin"], np.uint16)


def decoded_tokens(tars: list[str]) -> Iterator[NDArray[Any]]:
    """Arrays through the stock library and its decoders."""
    samples: Any = WebDataset(tars, shardshuffle=False, empty_check=False).decode()
    for sample in samples:
        yield sample["tokens.npy"]


def packed(documents: Iterator[NDArray[Any]], size: Size) -> Iterator[tuple[Tensor, Tensor]]:
    """Concatenate documents and cut batches of tokens and labels."""
    waiting: list[NDArray[Any]] = []
    num_waiting = 0
    for ids in documents:
        waiting.append(ids)
        num_waiting += len(ids)
        while num_waiting > size.batch_tokens:
            stream = np.concatenate(waiting)
            taken = torch.from_numpy(stream[: size.batch_tokens + 1].astype(np.int64))
            yield taken[:-1].view(size.batch_size, -1), taken[1:].view(size.batch_size, -1)
            waiting = [stream[size.batch_tokens :]]
            num_waiting -= size.batch_tokens


def write_flat_file(path: Path, num_tokens: int) -> Path:
    """One file of ids and nothing else."""
    np.concatenate(list(random_documents(num_tokens, MEAN_TOKENS, VOCAB_SIZE))).tofile(path)
    return path


def flat_batches(path: Path, size: Size) -> Iterator[tuple[Tensor, Tensor]]:
    """Windows at random places of a memory-mapped file: the least that a loader can do."""
    tokens = np.memmap(path, np.uint16, mode="r")
    rng = np.random.default_rng(0)
    for _ in range(len(tokens) // size.batch_tokens):
        places = rng.integers(0, len(tokens) - size.seq_len, size.batch_size)
        windows = np.stack([tokens[place : place + size.seq_len + 1] for place in places]).astype(np.int64)
        batch = torch.from_numpy(windows)
        yield batch[:, :-1], batch[:, 1:]
