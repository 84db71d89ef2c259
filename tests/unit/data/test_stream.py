import hashlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.config.data import WindowKind
from llmtrain.data.mixture import MixtureSchedule
from llmtrain.data.order import ContinuousOrder
from llmtrain.data.storage.manifest import Manifest, read_manifest
from llmtrain.data.storage.shard_file import ShardFile
from llmtrain.data.stream import SampleStream, StreamConfig, load_sources
from llmtrain.errors import DataError
from tests.support.datasets import random_documents, token_stream, write_dataset

SEQ_LEN = 16
PER_SHARD_SHA256 = "749bd254845cafc239fa4f65ca03ac6e171f89074ef7f0b1e0f98337d43acd27"
CONTINUOUS_SHA256 = "5a93424638e91b179c84192e5f410ad52f0e0a67e3b7f1258970d4c0877e180a"


@pytest.fixture(scope="module")
def two_sources(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("sources")
    for number, name in enumerate(("a", "b")):
        write_dataset(folder / name, [random_documents(20 + 5 * shard, 10 * number + shard) for shard in range(4)])
    return [folder / "a", folder / "b"]


def build(
    paths: list[Path], weights: list[int], seed: int = 1, shuffle_shards: int = 2, windows: WindowKind = "continuous"
) -> SampleStream:
    return SampleStream(load_sources(paths, weights), StreamConfig(seed, SEQ_LEN, shuffle_shards, windows=windows))


@given(weights=st.lists(st.integers(1, 40), min_size=1, max_size=5))
@settings(deadline=None)
def test_schedule_counts_each_source_in_order_and_spreads_it_evenly(weights: list[int]) -> None:
    schedule = MixtureSchedule(weights)
    total = sum(weights)
    turns = [0] * len(weights)
    for number in range(2 * total):
        source, turn = schedule.source_of(number)
        assert turn == turns[source]
        turns[source] += 1
        for index, weight in enumerate(weights):
            assert abs(turns[index] - (number + 1) * weight / total) <= len(weights)
    assert turns == [2 * weight for weight in weights]


def test_schedule_too_long_to_hold_is_refused() -> None:
    assert MixtureSchedule([10**9, 3 * 10**9]).source_of(4 * 10**9) == (1, 3 * 10**9)
    with pytest.raises(DataError, match="1,000,000"):
        MixtureSchedule([10**9, 10**9 + 1])


@given(number=st.integers(0, 10**9))
@settings(deadline=None)
def test_any_position_is_what_an_uninterrupted_stream_gives(two_sources: list[Path], number: int) -> None:
    """Resume: a fresh stream at g equals a stream that has already served others."""
    used = build(two_sources, [2, 1])
    for earlier in range(5):
        used.sample(number // 2 + earlier)
    fresh, expected = build(two_sources, [2, 1]).sample(number), used.sample(number)
    assert fresh.tokens.tolist() == expected.tokens.tolist()
    assert (fresh.source, fresh.epoch, fresh.shard, fresh.window) == (
        expected.source, expected.epoch, expected.shard, expected.window,
    )  # fmt: skip


@pytest.mark.parametrize("windows", ["per_shard", "continuous"])
def test_the_samples_of_a_seed_are_pinned(two_sources: list[Path], windows: WindowKind) -> None:
    """A run must find its samples again with a later version: these hashes must never change."""
    stream = build(two_sources, [2, 1], seed=1234, windows=windows)
    samples = [stream.sample(number) for number in (*range(50), 10**6)]
    content = b"".join(sample.tokens.tobytes() + sample.document_starts.tobytes() for sample in samples)
    pinned = {"per_shard": PER_SHARD_SHA256, "continuous": CONTINUOUS_SHA256}
    assert hashlib.sha256(content).hexdigest() == pinned[windows]


def test_every_token_is_a_target_once_in_every_epoch(two_sources: list[Path]) -> None:
    """Whatever the shards: windows cross their ends, and the epoch's own. The reference reads document by document."""
    manifest = read_manifest(two_sources[0])
    documents = [random_documents(20 + 5 * shard, shard) for shard in range(4)]
    stream = build(two_sources[:1], [1])
    order = ContinuousOrder([shard.stream_tokens for shard in manifest.shards], SEQ_LEN, 1, 0, 2)
    seen: Counter[tuple[int, int, int]] = Counter()
    epochs, number = 3, 0
    while (place := order.place(number)).epoch < epochs:
        sample, parts = stream.sample(number), order.parts(place)
        expected = np.concatenate([token_stream(documents[part.shard])[part.begin : part.end] for part in parts])
        assert sample.tokens.tolist() == expected.tolist() and len(expected) == SEQ_LEN + 1
        begins = [
            np.cumsum([0, *(len(document) + 1 for document in documents[part.shard])])[:-1] - part.begin
            for part in parts
        ]
        offsets = np.cumsum([0, *(part.end - part.begin for part in parts)])
        inside = [b[(b >= 0) & (b < p.end - p.begin)] + o for b, p, o in zip(begins, parts, offsets, strict=False)]
        assert sample.document_starts.tolist() == np.concatenate(inside).tolist()
        tokens = [(part.shard, token) for part in parts for token in range(part.begin, part.end)]
        seen.update((place.epoch, *token) for token in tokens[1:])
        number += 1
    once = Counter((shard, token) for epoch, shard, token in seen for _ in range(seen[epoch, shard, token]))
    every = {(shard, token) for shard in range(4) for token in range(len(token_stream(documents[shard])))}
    assert set(once) == every
    assert sum(once.values()) == number * SEQ_LEN
    assert max(once.values()) <= epochs + 1 and min(once.values()) >= epochs - 1
    # What the end of the third epoch borrows from the fourth, and the first token of all, make the only differences.
    assert sum(count != epochs for count in once.values()) <= SEQ_LEN + 1


def test_tiny_shards_are_used_whole(tmp_path: Path) -> None:
    """Each shard is shorter than a sample: before, no sample could be had of any of them."""
    documents = [[np.array([4 + number, 5 + number])] for number in range(40)]
    write_dataset(tmp_path, documents)
    with pytest.raises(DataError, match="no shard holds a whole sample"):
        build([tmp_path], [1], windows="per_shard")
    stream = build([tmp_path], [1])
    tokens = np.concatenate([stream.sample(number).tokens[1:] for number in range(15)])  # two epochs
    counts = Counter(tokens.tolist())
    first, borrowed = stream.sample(0).tokens[0], stream.sample(14).tokens[-1]  # of this epoch, and of the third
    expected = Counter({3: 80, **{4 + number: 2 for number in range(40)}}) + Counter(
        {5 + number: 2 for number in range(40)}
    )
    assert counts == expected + Counter([borrowed]) - Counter([first])


def test_per_shard_windows_are_those_of_before(two_sources: list[Path]) -> None:
    manifest = read_manifest(two_sources[0])
    stream = build(two_sources[:1], [1], windows="per_shard")
    count = manifest.num_windows(SEQ_LEN)
    samples = [stream.sample(number) for number in range(count)]
    served = Counter(sample.tokens.tobytes() for sample in samples)
    expected: Counter[bytes] = Counter()
    for shard in range(4):
        tokens = token_stream(random_documents(20 + 5 * shard, shard))
        for begin in range(0, len(tokens) - SEQ_LEN, SEQ_LEN):
            expected[tokens[begin : begin + SEQ_LEN + 1].tobytes()] += 1
    assert served == expected
    assert stream.sample(count).epoch == 1
    assert {Path(stream.shard_path(sample)).name for sample in samples} == {entry.file for entry in manifest.shards}


def test_seed_changes_the_order_but_not_the_mixture(two_sources: list[Path]) -> None:
    orders = [[build(two_sources, [2, 1], seed).sample(n) for n in range(60)] for seed in (1, 2)]
    assert [s.tokens.tolist() for s in orders[0]] != [s.tokens.tolist() for s in orders[1]]
    assert [s.source for s in orders[0]] == [s.source for s in orders[1]]
    assert Counter(s.source for s in orders[0]) == {0: 40, 1: 20}


def test_sources_of_different_tokenizers_are_refused(tmp_path: Path, two_sources: list[Path]) -> None:
    write_dataset(tmp_path / "c", [random_documents(20)], tokenizer_sha256="1" * 64)
    with pytest.raises(DataError, match="tokenizer_sha256"):
        load_sources([two_sources[0], tmp_path / "c"], [1, 1])
    write_dataset(tmp_path / "d", [random_documents(20)], vocab_size=301)
    with pytest.raises(DataError, match="vocab_size is 301, but 300"):
        load_sources([two_sources[0], tmp_path / "d"], [1, 1])


def test_too_little_text_is_refused(tmp_path: Path) -> None:
    write_dataset(tmp_path, [[np.arange(4, 10)], [np.arange(4, 8)]])
    with pytest.raises(DataError, match=r"holds 12 tokens .*less than the 16 \+ 1 .*Lower data\.seq_len"):
        build([tmp_path], [1])
    with pytest.raises(DataError, match=r"no shard holds a whole sample of 16 \+ 1 tokens; its largest has 7"):
        build([tmp_path], [1], windows="per_shard")


def test_verify_policies_hash_as_often_as_they_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_dataset(tmp_path, [random_documents(20, seed) for seed in range(6)])
    opened: list[bool] = []

    class Recorded(ShardFile):
        def __init__(self, folder: Path, manifest: Manifest, number: int, hashed: bool) -> None:
            opened.append(hashed)
            super().__init__(folder, manifest, number, hashed)

    monkeypatch.setattr("llmtrain.data.storage.folders.ShardFile", Recorded)
    hashes = {}
    for verify in ("off", "first", "always"):
        opened.clear()
        stream = SampleStream(load_sources([tmp_path], [1]), StreamConfig(1, SEQ_LEN, 1, verify))
        for number in range(4 * read_manifest(tmp_path).num_windows(SEQ_LEN)):  # shards are closed and opened again
            stream.sample(number)
        hashes[verify] = sum(opened), len(opened)
    assert hashes["off"][0] == 0
    assert hashes["first"][0] == 6 < hashes["first"][1]
    assert hashes["always"][0] == hashes["always"][1] > 6
