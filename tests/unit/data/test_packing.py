"""Best fit: against a slow reference, and samples that hold every token."""

from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.config.data import TooLong
from llmtrain.data import packing_table
from llmtrain.data.objectives.table import pack_sample
from llmtrain.data.packing import PackingPlan, PackingRule, packed_shard
from llmtrain.data.packing_table import load_packing
from llmtrain.data.storage.folders import open_folder
from llmtrain.data.storage.manifest import read_manifest
from llmtrain.data.stream import Sample, SampleStream, StreamConfig, load_sources
from llmtrain.errors import DataError
from llmtrain.values.batch import IGNORED_LABEL, PADDING
from tests.support.datasets import EOS_ID, random_documents, write_dataset
from tests.support.rows import EOS, row_config_of

lengths_lists = st.lists(st.integers(0, 60), min_size=1, max_size=50).map(np.array)


def best_fit(sizes: list[int], room: int) -> list[int]:
    """Room left in every sample, sorted: each piece goes where it leaves the least."""
    rooms: list[int] = []
    for size in sorted(sizes, reverse=True):
        fitting = [number for number, left in enumerate(rooms) if left >= size]
        if fitting:
            rooms[min(fitting, key=lambda number: rooms[number])] -= size
        else:
            rooms.append(room - size)
    return sorted(rooms)


@given(lengths=lengths_lists, seq_len=st.integers(1, 24))
@settings(max_examples=150, deadline=None)
def test_pieces_are_those_of_windows_and_go_where_they_fit_best(lengths: np.ndarray, seq_len: int) -> None:
    plan = PackingPlan.of(lengths, seq_len)
    sizes = plan.sizes_P.tolist()
    left = np.full(plan.summary.samples, seq_len + 1)
    np.subtract.at(left, plan.samples_P, np.sort(plan.sizes_P)[::-1])
    assert sorted(left.tolist()) == best_fit(sizes, seq_len + 1)
    assert plan.summary.padding == left.sum() and plan.summary.cut_documents == (lengths > seq_len).sum()
    # Every token but a document's first is the target of one piece: it stands in it, not at its begin.
    targets = Counter(
        token
        for begin, size in zip(plan.begins_P.tolist(), sizes, strict=True)
        for token in range(begin + 1, begin + size)
    )
    starts = np.cumsum(lengths + 1) - lengths - 1
    assert targets == Counter(set(range(int((lengths + 1).sum()))) - set(starts.tolist()))
    assert set(starts.tolist()) <= set(plan.begins_P.tolist())


@given(lengths=lengths_lists, seq_len=st.integers(1, 24), epoch=st.integers(0, 10**9))
@settings(max_examples=60, deadline=None)
def test_every_epoch_holds_every_piece_in_an_order_of_its_own(lengths: np.ndarray, seq_len: int, epoch: int) -> None:
    plan = PackingPlan.of(lengths, seq_len)
    expected = sorted(zip(plan.begins_P.tolist(), (plan.begins_P + plan.sizes_P).tolist(), strict=True))
    orders = []
    for number in (epoch, epoch + 1):
        shard = packed_shard(plan, 1, 0, number, 7)
        samples = [shard.parts(sample) for sample in range(plan.summary.samples)]
        assert sorted((part.begin, part.end) for parts in samples for part in parts) == expected
        assert all(sum(part.end - part.begin for part in parts) <= seq_len + 1 for parts in samples)
        assert samples == [packed_shard(plan, 1, 0, number, 7).parts(sample) for sample in range(len(samples))]
        orders.append(samples)
    if len(set(lengths.tolist())) < len(lengths) - 12 and max(lengths) < seq_len:
        assert orders[0] != orders[1], "pieces of one length change places"


@given(lengths=lengths_lists, seq_len=st.integers(1, 24), too_long=st.sampled_from(["drop", "truncate", "error"]))
@settings(max_examples=60, deadline=None)
def test_whole_documents_are_never_cut_in_two(lengths: np.ndarray, seq_len: int, too_long: TooLong) -> None:
    """Alone or packed: each is there once, one that is too long with its begin or not at all."""
    starts = np.cumsum(lengths + 1) - lengths - 1
    fits = lengths <= seq_len
    kept = fits | (too_long == "truncate")
    for kind in ("single", "best_fit"):
        plan = PackingPlan.of(lengths, seq_len, PackingRule(kind, too_long))
        assert plan.begins_P.tolist() == starts[kept].tolist()
        assert plan.sizes_P.tolist() == np.minimum(lengths + 1, seq_len + 1)[kept].tolist()
        dropped = 0 if too_long == "truncate" else int((~fits).sum())
        assert (plan.summary.dropped_documents, plan.summary.cut_documents) == (dropped, int((~fits).sum()) - dropped)
        assert plan.summary.longest == lengths.max(initial=0)
        shard = packed_shard(plan, 1, 0, 0, 0)
        pieces = [len(shard.parts(sample)) for sample in range(plan.summary.samples)]
        assert sum(pieces) == kept.sum() and (kind == "best_fit" or set(pieces) <= {1})


SEQ_LEN = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    write_dataset(folder / "data", [random_documents(40, seed, longest=70) for seed in range(5)])
    return folder


def stream(folder: Path, seed: int = 1) -> SampleStream:
    (source,) = load_sources([folder / "data"], [1])
    packing = load_packing(source.folder, source.manifest, SEQ_LEN, folder / "cache")
    return SampleStream([type(source)(source.folder, source.manifest, packing=packing)], StreamConfig(seed, SEQ_LEN, 2))


def texts_of(samples: list[Sample]) -> list[bytes]:
    """Every piece of the samples."""
    found = []
    for sample in samples:
        bounds = [*sample.document_starts.tolist(), len(sample.tokens) - sample.padding]
        found += [sample.tokens[b:e].tobytes() for b, e in pairwise(bounds)]
    return found


def test_an_epoch_of_samples_holds_every_document_once(folder: Path) -> None:
    packing = load_packing(open_folder(folder / "data"), read_manifest(folder / "data"), SEQ_LEN, folder / "cache")
    expected, cut = [], 0
    for seed in range(5):
        for document in random_documents(40, seed, longest=70):
            whole = np.append(document, EOS_ID)
            begins = range(0, max(1, len(whole) - 1), SEQ_LEN)
            expected += [whole[begin : begin + SEQ_LEN + 1].tobytes() for begin in begins]
            cut += len(begins) > 1
    opened, orders = stream(folder), []
    for epoch in range(2):
        samples = [opened.sample(epoch * packing.samples + number) for number in range(packing.samples)]
        assert {sample.epoch for sample in samples} == {epoch}
        assert Counter(texts_of(samples)) == Counter(expected)
        padding = sum(sample.padding for sample in samples)
        assert padding / (packing.samples * (SEQ_LEN + 1)) == packing.padding_share and cut == packing.cut_documents
        orders.append([sample.tokens.tobytes() for sample in samples])
    assert orders[0] != orders[1] and len(set(orders[0]) & set(orders[1])) < packing.samples, "others meet"
    assert 0 < packing.padding_share < 0.1


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize(("family", "objective"), [("decoder", "causal"), ("decoder", "fim"), ("encoder", "masked")])
def test_padding_is_no_target_of_any_objective(family: str, objective: str, reset: bool) -> None:
    """Twelve tokens in three documents, the last of which goes on; five positions and the token behind are padding."""
    row_config = row_config_of(family, objective, 16, packing="best_fit", reset_attention=reset)
    tokens = np.array([*range(10, 14), EOS, *range(20, 23), EOS, *range(30, 33), *[EOS] * 5])
    for number in range(20):
        sample = Sample(number, tokens, np.array([0, 5, 9]), 0, 0, 0, 0, padding=5)
        row = pack_sample(sample, row_config)
        assert (row.labels_S[11:] == IGNORED_LABEL).all() and (row.labels_S != IGNORED_LABEL).any()
        if row.segments_S is None:
            assert family == "decoder" and not reset, "what stands behind is not seen"
        else:
            documents = [0] * 5 + [1] * 4 + [2] * 3 if reset else [0] * 12
            assert row.segments_S.tolist() == [*documents, *[PADDING] * 4]
        if objective != "fim":
            kept = row.labels_S[:11] == IGNORED_LABEL if objective == "masked" else slice(11)
            assert row.tokens_S[:11][kept].tolist() == tokens[:11][kept].tolist()
        else:
            assert row.tokens_S[12:].tolist() == tokens[12:16].tolist()
        full = pack_sample(Sample(number, tokens, np.array([0, 5, 9]), 0, 0, 0, 0), row_config)
        assert (full.segments_S is None) == (row.segments_S is None), "all rows of a batch, or none"


@given(number=st.integers(0, 10**9))
@settings(max_examples=40, deadline=None)
def test_any_position_is_what_an_uninterrupted_stream_gives(folder: Path, number: int) -> None:
    used = stream(folder)
    for earlier in range(4):
        used.sample(number // 2 + earlier)
    fresh, expected = stream(folder).sample(number), used.sample(number)
    assert fresh.tokens.tolist() == expected.tokens.tolist() and fresh.padding == expected.padding
    assert fresh.document_starts.tolist() == expected.document_starts.tolist()


def test_an_id_that_is_none_is_named(tmp_path: Path) -> None:
    """Of a file that was spoiled behind its hash."""
    write_dataset(tmp_path / "data", [random_documents(20, 0, longest=30)])
    manifest = read_manifest(tmp_path / "data")
    opened = stream(tmp_path)
    shard = opened._readers[0]._shard(0)
    assert shard is not None
    spoiled = shard._tokens.copy()
    spoiled[int(shard._first[4]) + 2] = 9999
    shard._tokens = spoiled
    with pytest.raises(DataError, match=r"document 4, byte \d+: expected an id below 300, actual 9999"):
        for number in range(load_packing(open_folder(tmp_path / "data"), manifest, SEQ_LEN, tmp_path).samples):
            opened.sample(number)


def test_documents_of_a_sample_are_named(folder: Path) -> None:
    opened = stream(folder)
    for number in range(60):
        sample, position = opened.sample(number), 0
        for part in opened.documents(number):
            seed = int(Path(part.shard).stem.rpartition("-")[2])
            whole = np.append(random_documents(40, seed, longest=70)[part.document], EOS_ID)
            tokens = sample.tokens[position : position + part.end - part.begin]
            assert tokens.tolist() == whole[part.begin : part.end].tolist()
            assert (part.key, part.ends) == (f"{part.document:09d}", part.end == len(whole))
            position += len(tokens)
        assert position == len(sample.tokens) - sample.padding


def test_the_packing_is_counted_once_and_counted_again_where_it_was_spoiled(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, manifest = open_folder(folder / "data"), read_manifest(folder / "data")
    counted: list[int] = []
    whole = PackingPlan.of

    def recorded(lengths: np.ndarray, seq_len: int, rule: PackingRule) -> PackingPlan:
        counted.append(len(lengths))
        return whole(lengths, seq_len, rule)

    monkeypatch.setattr(packing_table.PackingPlan, "of", recorded)
    first = load_packing(data, manifest, SEQ_LEN, tmp_path)
    assert load_packing(data, manifest, SEQ_LEN, tmp_path) == first and len(counted) == 5
    assert load_packing(data, manifest, SEQ_LEN + 1, tmp_path) != first and len(counted) == 10
    for path in (tmp_path / "packing").glob("*.json"):
        content = bytearray(path.read_bytes())
        content[20] ^= 1
        path.write_bytes(content)
    assert load_packing(data, manifest, SEQ_LEN, tmp_path) == first and len(counted) == 15
    (tmp_path / "file").write_text("")
    assert load_packing(data, manifest, SEQ_LEN, tmp_path / "file") == first, "a cache that cannot be written"


def test_a_damaged_sidecar_ends_the_run_before_it_begins(tmp_path: Path) -> None:
    write_dataset(tmp_path / "data", [random_documents(20, seed) for seed in range(2)])
    sidecar = tmp_path / "data" / "shard-000001.idx"
    content = bytearray(sidecar.read_bytes())
    content[-8] ^= 2
    sidecar.write_bytes(content)
    with pytest.raises(DataError, match=r"shard-000001\.idx: expected sha256"):
        stream(tmp_path)
