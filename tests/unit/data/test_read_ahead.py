"""Shards are opened before they are needed, and nothing is taken from one that was not hashed."""

import gc
import threading
import time
from pathlib import Path

import pytest

from llmtrain.data.order import ContinuousOrder, SampleOrder
from llmtrain.data.read_ahead import ReadAhead
from llmtrain.data.storage.manifest import Manifest, file_sha256, read_manifest
from llmtrain.data.storage.shard_file import ShardFile
from llmtrain.data.stream import SampleStream, StreamConfig, load_sources
from llmtrain.errors import DataError
from tests.support.datasets import random_documents, write_dataset

SEQ_LEN = 16


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "read-ahead"]


def wait_until_none_is_left() -> None:
    deadline = time.monotonic() + 60
    while threads():
        gc.collect()
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    write_dataset(tmp_path, [random_documents(20, seed) for seed in range(6)])
    return tmp_path


def build(dataset: Path, read_ahead: bool = True, shuffle_shards: int = 2) -> SampleStream:
    config = StreamConfig(1, SEQ_LEN, shuffle_shards, "first", read_ahead)
    return SampleStream(load_sources([dataset], [1]), config)


def test_the_samples_are_the_same(dataset: Path) -> None:
    count = 3 * read_manifest(dataset).num_windows(SEQ_LEN)
    ahead, plain = build(dataset), build(dataset, read_ahead=False)
    for number in range(count):
        assert ahead.sample(number).tokens.tolist() == plain.sample(number).tokens.tolist()


def test_every_shard_is_hashed_before_its_first_sample_and_once(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of events: no window of a shard is read before that shard's hash is complete."""
    events: list[tuple[str, str]] = []

    def hashed(path: Path) -> str:
        time.sleep(0.005)  # so that a stream that does not wait would be ahead
        result = file_sha256(path)
        events.append(("hashed", path.stem))
        return result

    class Watched(ShardFile):
        def __init__(self, folder: Path, manifest: Manifest, number: int, hashed: bool) -> None:
            super().__init__(folder, manifest, number, hashed)
            self.name = manifest.shards[number].file.removesuffix(".tar")

        def read_into(self, tokens, begin: int):  # type: ignore[no-untyped-def]  # as in the class above
            events.append(("read", self.name))
            return super().read_into(tokens, begin)

    monkeypatch.setattr("llmtrain.data.storage.manifest.file_sha256", hashed)
    monkeypatch.setattr("llmtrain.data.storage.folders.ShardFile", Watched)
    stream = build(dataset)
    for number in range(2 * read_manifest(dataset).num_windows(SEQ_LEN)):
        stream.sample(number)
    for shard in range(6):
        name = f"shard-{shard:06d}"
        assert events.count(("hashed", name)) == 2  # the tar, and its sidecar
        first_read = events.index(("read", name))
        assert events[:first_read].count(("hashed", name)) == 2


def test_the_next_shards_are_opened_behind_the_reading(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: dict[int, str] = {}

    class Watched(ShardFile):
        def __init__(self, folder: Path, manifest: Manifest, number: int, hashed: bool) -> None:
            super().__init__(folder, manifest, number, hashed)
            opened[number] = threading.current_thread().name

    monkeypatch.setattr("llmtrain.data.storage.folders.ShardFile", Watched)
    stream = build(dataset, shuffle_shards=1)
    order = ContinuousOrder([shard.stream_tokens for shard in read_manifest(dataset).shards], SEQ_LEN, 1, 0, 1)
    first = order.place(0).shard
    _, middle = order.coming_shards(0)
    (second,), _ = order.coming_shards(middle)
    stream.sample(0)
    assert second not in opened  # a short evaluation opens nothing that it does not need
    stream.sample(middle)
    deadline = time.monotonic() + 60
    while second not in opened:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    assert opened[second] == "read-ahead"
    assert set(opened) == {first, second}


def first_of_second_shard(stream: SampleStream) -> int:
    return next(n for n in range(10_000) if stream.origin(n).shard != stream.origin(0).shard)


def test_damage_ahead_is_told_where_it_is_due(dataset: Path) -> None:
    stream = build(dataset, shuffle_shards=1)
    damaged = dataset / stream.origin(first_of_second_shard(stream)).shard
    due = first_of_second_shard(stream) - 1  # the last window of a shard ends in the next one
    damaged.write_bytes(damaged.read_bytes()[:-512])
    for number in range(due):
        stream.sample(number)
    with pytest.raises(DataError, match=damaged.name):
        stream.sample(due)


def test_what_failed_ahead_is_tried_again_at_its_use(dataset: Path) -> None:
    stream = build(dataset, shuffle_shards=1)
    moved = dataset / stream.origin(first_of_second_shard(stream)).shard
    due = first_of_second_shard(stream) - 1
    moved.rename(dataset / "elsewhere")
    for number in range(due):
        stream.sample(number)
    (dataset / "elsewhere").rename(moved)
    assert stream.sample(due).tokens.tolist() == build(dataset, False, 1).sample(due).tokens.tolist()


def test_the_thread_ends_with_the_stream(dataset: Path) -> None:
    wait_until_none_is_left()
    stream = build(dataset)
    for number in range(read_manifest(dataset).num_windows(SEQ_LEN)):
        stream.sample(number)
    assert len(threads()) == 1
    del stream
    wait_until_none_is_left()
    build(dataset, read_ahead=False).sample(0)
    assert not threads()


def test_a_cancelled_task_is_not_begun() -> None:
    ahead: ReadAhead[int] = ReadAhead()
    gate = threading.Event()
    done: list[int] = []
    waiting = ahead.submit(lambda: int(gate.wait(60)))
    cancelled, kept = ahead.submit(lambda: done.append(1) or 1), ahead.submit(lambda: done.append(2) or 2)
    assert cancelled.cancel()
    gate.set()
    assert (waiting.result(60), kept.result(60), done) == (1, 2, [2])


def test_coming_shards_are_those_that_come() -> None:
    """In the second half of a group, those that the next group's samples lie in."""
    windows = [3, 0, 5, 2, 7, 1]
    order = SampleOrder(windows, SEQ_LEN, seed=3, source=0, group_size=3)
    number, groups = 0, 0
    while number < 3 * sum(windows):
        named, until = order.coming_shards(number)
        assert until > number and all(windows[shard] for shard in named)
        if named:
            groups += 1
            following = order.coming_shards(until)[1]
            assert {order.place(n).shard for n in range(until, following)} <= set(named)
        number = until
    assert groups == 3 * 2  # two groups in each of three epochs
