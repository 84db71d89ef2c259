"""A cache with a limit: what is least recently used and read by nobody makes room, whoever else uses the cache."""

import gc
import multiprocessing
import os
from collections.abc import Iterator
from hashlib import sha256
from multiprocessing.synchronize import Event
from pathlib import Path

import numpy as np
import pytest

from llmtrain.config.data import DataConfig, SourceConfig
from llmtrain.data.loader import build_stream
from llmtrain.data.storage import cache as cache_module
from llmtrain.data.storage.cache import HeldFile, make_room
from llmtrain.data.storage.folders import fetch_config, open_folder
from llmtrain.data.storage.manifest import Manifest
from llmtrain.data.storage.remote import FetchConfig
from llmtrain.errors import DataError
from tests.support.datasets import write_dataset
from tests.support.http_folder import HttpFolder, serve

NUM_SHARDS = 6


@pytest.fixture(autouse=True)
def local(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(cache_module, "_warned", set())


@pytest.fixture
def data(tmp_path: Path) -> Manifest:
    generator = np.random.default_rng(0)
    return write_dataset(tmp_path / "served", [[generator.integers(4, 300, 4000)] for _ in range(NUM_SHARDS)])


@pytest.fixture
def server(tmp_path: Path, data: Manifest) -> Iterator[HttpFolder]:
    with serve(tmp_path / "served") as folder:
        yield folder


def shard_bytes(data: Manifest, count: int) -> int:
    """Room for so many shards with their sidecars, and not for one more."""
    return count * (data.shards[0].bytes + 100)


def cached(cache_dir: Path) -> set[str]:
    return {path.name for path in cache_dir.glob("*.tar")}


def name_of(data: Manifest, number: int) -> str:
    return f"{data.shards[number].sha256}.tar"


def test_the_least_recently_used_make_room(server: HttpFolder, data: Manifest, tmp_path: Path) -> None:
    limit = shard_bytes(data, 3)
    folder = open_folder(server.url, FetchConfig(tmp_path / "cache", 2, 5.0, limit))
    for number in (0, 1, 2, 0, 3, 4):
        folder.open_shard(data, number, hashed=False)  # nobody keeps it
        assert sum(path.stat().st_size for path in (tmp_path / "cache").iterdir()) <= limit
    assert cached(tmp_path / "cache") == {name_of(data, number) for number in (0, 3, 4)}
    assert server.requests[data.shards[0].file] == 1


def test_what_is_read_stays(
    server: HttpFolder, data: Manifest, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = open_folder(server.url, FetchConfig(tmp_path / "cache", 2, 5.0, shard_bytes(data, 2)))
    held = [folder.open_shard(data, number, hashed=False) for number in range(3)]
    assert {name_of(data, number) for number in range(3)} <= cached(tmp_path / "cache")
    assert caplog.text.count("more than data.cache_limit_gb") == 1
    held.pop(1)
    folder.open_shard(data, 3, hashed=False)
    assert cached(tmp_path / "cache") == {name_of(data, number) for number in (0, 2, 3)}
    assert all(len(shard.document(0)) == 4000 for shard in held)


def _holding(path: Path, holds: Event, done: Event) -> None:
    held = HeldFile(lambda: path)
    holds.set()
    done.wait(30)
    assert held.path.read_bytes() == b"one"
    os._exit(0)


def test_another_process_keeps_what_it_reads(tmp_path: Path) -> None:
    paths = []
    for number, content in enumerate((b"one", b"two", b"three")):
        paths.append(tmp_path / f"{sha256(content).hexdigest()}.tar")
        paths[-1].write_bytes(content)
        os.utime(paths[-1], (number, number))
    (tmp_path / "tokenizer.model").write_bytes(b"x" * 100)
    spawned = multiprocessing.get_context("spawn")
    holds, done = spawned.Event(), spawned.Event()
    process = spawned.Process(target=_holding, args=(paths[0], holds, done))
    process.start()
    assert holds.wait(30)
    make_room(tmp_path, 5, 2, tmp_path / "coming")
    assert [path.exists() for path in paths] == [True, False, False], "it was the oldest, and is being read"
    done.set()
    process.join(30)
    assert process.exitcode == 0
    make_room(tmp_path, 5, 4, tmp_path / "coming")
    assert not paths[0].exists() and (tmp_path / "tokenizer.model").exists()


def test_a_file_that_goes_before_it_is_held_is_fetched_again(tmp_path: Path) -> None:
    path, fetched = tmp_path / "a.tar", []

    def fetch() -> Path:
        fetched.append(1)
        if len(fetched) > 1:
            path.write_bytes(b"again")
        return path

    assert HeldFile(fetch).path.read_bytes() == b"again" and len(fetched) == 2
    with pytest.raises(DataError, match=r"Raise data\.cache_limit_gb"):
        HeldFile(lambda: tmp_path / "never")


@pytest.mark.parametrize("packing", ["none", "best_fit"])
def test_a_stream_that_is_gone_holds_nothing(server: HttpFolder, data: Manifest, tmp_path: Path, packing: str) -> None:
    """Without Python's collector, which runs of several ranks turn off."""
    keys = {"seq_len": 64, "cache_dir": str(tmp_path / "cache"), "packing": packing, "prefetch_steps": 0}
    config = DataConfig(train=(SourceConfig(path=server.url),), **keys)
    gc.disable()
    try:
        stream = build_stream(config.train, config, 1)
        stream.sample(0)
        make_room(tmp_path / "cache", 0, 1, tmp_path / "coming")
        assert len(cached(tmp_path / "cache")) == 1, "it is being read"
        del stream
        make_room(tmp_path / "cache", 0, 1, tmp_path / "coming")
        assert not cached(tmp_path / "cache")
    finally:
        gc.enable()


def test_runs_with_and_without_a_limit_read_the_same(server: HttpFolder, data: Manifest, tmp_path: Path) -> None:
    """Two runs in turn, on one cache that holds two of six shards."""
    read = {}
    for name, limit in (("small", shard_bytes(data, 2) / 1e9), ("large", None)):
        cache = str(tmp_path / ("cache" if limit else "other"))
        keys = {"seq_len": 64, "cache_dir": cache, "cache_limit_gb": limit, "shuffle_shards": 1}
        config = DataConfig(train=(SourceConfig(path=server.url),), **keys)
        streams = [build_stream(config.train, config, seed) for seed in (1, 2)]
        read[name] = [stream.sample(number).tokens.tolist() for number in range(400) for stream in streams]
    assert read["small"] == read["large"]
    assert fetch_config(config).limit_bytes is None
