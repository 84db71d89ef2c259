import io
import json
import pickle
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.dataset_writer import ShardWriter
from llmtrain.data.storage.manifest import DTYPES, index_bytes, read_index, read_manifest
from llmtrain.data.storage.shard_file import ShardFile
from llmtrain.errors import DataError
from tests.support.datasets import EOS_ID, random_documents, token_stream, write_dataset


def test_stock_webdataset_reads_the_same_documents(tmp_path: Path) -> None:
    shards = [random_documents(20, seed) for seed in range(2)]
    write_dataset(tmp_path, shards)
    urls = [str(path) for path in sorted(tmp_path.glob("*.tar"))]
    read = [np.frombuffer(s["bin"], "<u2") for s in webdataset.WebDataset(urls, shardshuffle=False)]
    documents = shards[0] + shards[1]
    assert len(read) == len(documents)
    assert all(np.array_equal(ours, theirs) for ours, theirs in zip(documents, read, strict=True))


@pytest.mark.parametrize("vocab_size", [300, 65536, 65537])
def test_documents_come_back(tmp_path: Path, vocab_size: int) -> None:
    documents = [*random_documents(5), np.array([vocab_size - 1])]
    manifest = write_dataset(tmp_path, [documents], vocab_size)
    assert manifest.dtype == ("uint16" if vocab_size <= 65536 else "uint32")
    assert read_manifest(tmp_path) == manifest
    shard = ShardFile(tmp_path, manifest, 0)
    assert shard.num_documents == 6
    assert all(np.array_equal(shard.document(n), document) for n, document in enumerate(documents))


lengths_lists = st.lists(st.integers(0, 12), min_size=1, max_size=12)


@given(lengths=lengths_lists, seq_len=st.integers(1, 30))
@settings(max_examples=80, deadline=None)
def test_windows_equal_a_slow_reference(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], seq_len: int
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    documents = [np.arange(length) % 200 + 10 * number + 4 for number, length in enumerate(lengths)]
    manifest = write_dataset(folder, [documents], vocab_size=1000)
    shard = ShardFile(folder, manifest, 0)
    stream = token_stream(documents)
    document_begins = np.cumsum([0, *(length + 1 for length in lengths)])[:-1]
    count = manifest.num_windows(seq_len)
    assert count == max(0, len(range(0, len(stream) - seq_len, seq_len)))
    for number in range(count):
        begin = number * seq_len
        tokens = np.full(seq_len + 1, -7)  # all of it is written over
        starts = shard.read_into(tokens, begin)
        assert tokens.tolist() == stream[begin : begin + seq_len + 1].tolist()
        inside = (document_begins >= begin) & (document_begins <= begin + seq_len)
        assert starts.tolist() == (document_begins[inside] - begin).tolist()
    for begin, end in ((-1, seq_len), (0, len(stream) + 1), (0, 0), (len(stream), len(stream) + 1)):
        with pytest.raises(IndexError):
            shard.read_into(np.empty(end - begin, np.int64), begin)


def test_windows_overlap_by_one_token_so_that_every_token_is_a_target(tmp_path: Path) -> None:
    documents = random_documents(30)
    manifest = write_dataset(tmp_path, [documents])
    shard = ShardFile(tmp_path, manifest, 0)
    windows = np.empty((manifest.num_windows(16), 17), np.int64)
    for number, window in enumerate(windows):
        shard.read_into(window, 16 * number)
    targets = np.concatenate([window[1:] for window in windows])
    assert targets.tolist() == token_stream(documents)[1 : len(targets) + 1].tolist()


def test_same_documents_give_the_same_bytes(tmp_path: Path) -> None:
    documents = random_documents(10)
    for name in ("a", "b"):
        write_dataset(tmp_path / name, [documents])
    for path in sorted((tmp_path / "a").iterdir()):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
    with tarfile.open(tmp_path / "a" / "shard-000000.tar") as tar:
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname) for m in tar} == {(0, 0, 0, "", "")}


def _manifest_with(folder: Path, change: dict[str, Any] | None = None, shard: dict[str, Any] | None = None) -> None:
    path = folder / "manifest.json"
    raw = json.loads(path.read_text())
    raw |= change or {}
    raw["shards"][0] |= shard or {}
    path.write_text(json.dumps(raw))


@pytest.mark.parametrize(
    ("change", "shard", "says"),
    [
        ({"schema_version": 3}, None, "schema_version = 3"),
        ({"schema_version": 1}, None, "has a seal"),
        ({"seal": None}, None, "expected None"),
        ({"seal": "0" * 64}, None, "expected 000"),
        ({"eos_id": 2}, None, "do not give the seal"),
        ({"vocab_size": 301}, None, "do not give the seal"),
        ({"tokenizer_sha256": "1" * 64}, None, "do not give the seal"),
        (None, {"samples": 2}, "do not give the seal"),
        ({"schema_version": None}, None, "schema_version = None"),
        ({"extra": 1}, None, "extra = 1: "),
        ({"vocab_size": "300"}, None, "vocab_size = '300'"),
        ({"vocab_size": True}, None, "vocab_size = True"),
        ({"vocab_size": -1}, None, "vocab_size = -1"),
        ({"vocab_size": 70000}, None, "every id must fit"),
        ({"eos_id": 300}, None, "eos_id = 300"),
        ({"dtype": "object"}, None, "dtype = 'object'"),
        (None, {"file": "../outside.tar"}, "plain name"),
        (None, {"file": "pipe:/bin/true"}, "plain name"),
        (None, {"index_file": "a\\b"}, "plain name"),
        (None, {"index_file": ".."}, "plain name"),
        (None, {"index_file": "shard-000000.tar"}, "named twice"),
        (None, {"samples": 1.5}, "shards[0].samples = 1.5: "),
        (None, {"tokens": -1}, "shards[0].tokens = -1: "),
        (None, {"more": 1}, "shards[0].more = 1: "),
        ({"bos_ids": [300]}, None, "bos_ids = [300]: must be ids below vocab_size = 300"),
        ({"bos_ids": [True]}, None, "bos_ids[0] = True: "),
        ({"lossy": 1}, None, "lossy = 1: "),
        ({"shards": [{}, 1]}, None, "shards[0].file"),
    ],
)
def test_wrong_manifest_is_refused(
    tmp_path: Path, change: dict[str, Any] | None, shard: dict[str, Any] | None, says: str
) -> None:
    write_dataset(tmp_path, [random_documents(3)])
    _manifest_with(tmp_path, change, shard)
    with pytest.raises(DataError, match=r"manifest\.json") as error:
        read_manifest(tmp_path)
    assert says in str(error.value)


def test_every_flipped_digit_or_letter_of_a_manifest_is_found(tmp_path: Path) -> None:
    write_dataset(tmp_path, [random_documents(3)])
    path = tmp_path / "manifest.json"
    whole = path.read_bytes()
    manifest = read_manifest(tmp_path)
    unseen = []
    for position in range(len(whole)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        try:
            assert read_manifest(tmp_path) == manifest
            unseen.append(whole[position : position + 1])
        except DataError:
            continue
    assert not unseen, "and a space between values has no neighbour that is one"


def test_a_manifest_of_before_seals_is_read_and_a_seal_cannot_be_taken_away(tmp_path: Path) -> None:
    manifest = write_dataset(tmp_path, [random_documents(3)])
    path = tmp_path / "manifest.json"
    raw = json.loads(path.read_text())
    del raw["seal"]
    path.write_text(json.dumps(raw))
    with pytest.raises(DataError, match="has no seal"):
        read_manifest(tmp_path)
    path.write_text(json.dumps({**raw, "schema_version": 1}))
    assert read_manifest(tmp_path) == replace(manifest, schema_version=1)


def test_missing_or_torn_manifest_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="llmtrain data index"):
        read_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text('{"schema_version": 1, "sh')
    with pytest.raises(DataError, match="not JSON"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("content", [b"", b"short", b"x" * 16, index_bytes(np.ones((3, 2), np.uint64))[:-1]])
def test_damaged_sidecar_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.idx"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.idx"):
        read_index(path)


def test_sidecar_is_checked_even_without_hashes(tmp_path: Path) -> None:
    manifest = write_dataset(tmp_path, [random_documents(5)])
    path = tmp_path / "shard-000000.idx"
    places = read_index(path)
    shifted, outside = places.copy(), places.copy()
    shifted[:, 0] += 1
    outside[-1, 0] = 1 << 40
    for spoiled in (places[:-1], shifted, outside):
        path.write_bytes(index_bytes(spoiled))
        with pytest.raises(DataError, match=r"shard-000000\.idx"):
            ShardFile(tmp_path, manifest, 0, hashed=False)


def test_hostile_members_of_a_foreign_tar_are_never_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the places in the sidecar are read, and only `.bin` members have one: nothing is unpickled."""
    from data_pipelines.indexing import scan_tar

    def unpickle(*_: Any, **__: Any) -> None:
        raise AssertionError("unpickled")

    array = io.BytesIO()
    np.save(array, np.array([{"a": 1}], object), allow_pickle=True)
    payload = np.array([5, 6, 7], "<u2").tobytes()
    members = {
        "0.pkl": pickle.dumps({"a": 1}),
        "0.bin": payload,
        "1.npy": array.getvalue(),
        "1.pyd": b"x",
        "1.bin": payload,
    }
    with tarfile.open(tmp_path / "foreign.tar", "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size, member.mtime = len(content), 1.5  # a fraction: a pax header before each member
            tar.addfile(member, io.BytesIO(content))
    monkeypatch.setattr(pickle, "load", unpickle)
    monkeypatch.setattr(pickle, "loads", unpickle)
    places = scan_tar(tmp_path / "foreign.tar")
    content = (tmp_path / "foreign.tar").read_bytes()
    assert [content[offset : offset + size] for offset, size in places.tolist()] == [payload, payload]


def test_writer_finds_the_same_places_as_a_scan(tmp_path: Path) -> None:
    from data_pipelines.indexing import scan_tar

    writer = ShardWriter(tmp_path, "a", DTYPES["uint16"])
    for number, length in enumerate((0, 1, 255, 256, 257, 5000)):
        writer.add(str(number), np.full(length, EOS_ID))
    writer.finish()
    assert np.array_equal(read_index(tmp_path / "a.idx"), scan_tar(tmp_path / "a.tar"))
