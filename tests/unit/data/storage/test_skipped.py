"""on_corrupt = skip: no coordinate moves, samples of a damaged shard have no targets, and the decision is kept."""

import json
import multiprocessing
from pathlib import Path

import numpy as np
import pytest

from llmtrain.config.data import DataConfig
from llmtrain.data.loader import BatchLoader, build_stream
from llmtrain.data.order import ContinuousOrder
from llmtrain.data.row_config import RowConfig
from llmtrain.data.storage.manifest import read_manifest
from llmtrain.data.storage.skipped import LEDGER_NAME, SkippedShard, SkippedShards, SourceSamples
from llmtrain.data.stream import Sample, SampleStream
from llmtrain.errors import DataError
from llmtrain.files import unsealed
from llmtrain.values.batch import IGNORED_LABEL
from tests.support.datasets import random_documents, write_dataset

SEQ_LEN = 16
NUM_SHARDS = 5
SPOILED = 3


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder; beside it a data set whose shard 3 is damaged."""
    write_dataset(tmp_path / "data", [random_documents(25, seed) for seed in range(NUM_SHARDS)])
    spoil(tmp_path / "data")
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def shard(folder: Path, number: int = SPOILED) -> Path:
    return folder / f"shard-{number:06d}.tar"


def spoil(folder: Path, number: int = SPOILED) -> None:
    """Done twice, the file is whole again."""
    content = bytearray(shard(folder, number).read_bytes())
    content[600] ^= 1
    shard(folder, number).write_bytes(content)


def config(run: Path, **changes: object) -> DataConfig:
    settings: dict[str, object] = {
        "train": [{"path": str(run.parent / "data")}], "seq_len": SEQ_LEN, "on_corrupt": "skip", "max_skipped": 0.5,
    }  # fmt: skip
    return DataConfig.model_validate(settings | changes)


def stream(run: Path, **changes: object) -> SampleStream:
    data = config(run, **changes)
    return build_stream(data.train, data, seed=1, run_dir=run)


def samples(run: Path, **changes: object) -> list[Sample]:
    """One epoch."""
    opened = stream(run, **changes)
    return [opened.sample(number) for number in range(read_manifest(run.parent / "data").num_windows(SEQ_LEN))]


def needing(run: Path) -> int:
    """Samples of an epoch that may need the spoiled shard: it begins and ends inside of one."""
    return -(-read_manifest(run.parent / "data").shards[SPOILED].stream_tokens // SEQ_LEN) + 1


def ledger(run: Path) -> list[dict[str, object]]:
    return [unsealed(json.loads(line)) for line in (run / LEDGER_NAME).read_text().splitlines()]


def blanks(taken: list[Sample]) -> set[int]:
    return {sample.number for sample in taken if sample.blank}


@pytest.mark.parametrize("prefetch_steps", [0, 2])
def test_other_samples_stay_what_and_where_they_were(run: Path, prefetch_steps: int) -> None:
    skipping = samples(run, prefetch_steps=prefetch_steps)
    spoil(run.parent / "data")
    whole = samples(run, on_corrupt="fail")
    assert len(skipping) == len(whole)
    for with_skips, without in zip(skipping, whole, strict=True):
        assert (with_skips.number, with_skips.epoch, with_skips.shard, with_skips.window) == (
            without.number, without.epoch, without.shard, without.window,
        )  # fmt: skip
        if without.shard == SPOILED:
            assert with_skips.blank
        if not with_skips.blank:
            assert with_skips.tokens.tolist() == without.tokens.tolist()
    assert 0 < len(blanks(skipping)) <= needing(run)


@pytest.mark.parametrize("windows", ["per_shard", "continuous"])
def test_a_sample_is_blank_where_any_token_of_it_is_lost(run: Path, windows: str) -> None:
    """And nowhere else: with windows inside of shards, those of the damaged one."""
    skipping = blanks(samples(run, windows=windows))
    spoil(run.parent / "data")
    lengths = [entry.stream_tokens for entry in read_manifest(run.parent / "data").shards]
    if windows == "per_shard":
        kept = {sample.number for sample in samples(run, windows=windows) if sample.shard == SPOILED}
    else:
        order = ContinuousOrder(lengths, SEQ_LEN, 1, 0, 8)
        parts = {number: order.parts(order.place(number)) for number in range(len(samples(run)))}
        kept = {number for number, found in parts.items() if SPOILED in {part.shard for part in found}}
    assert skipping == kept


def test_the_ledger_says_what_is_missing(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples(run)
    entry = read_manifest(run.parent / "data").shards[SPOILED]
    (row,) = ledger(run)
    assert row == {
        "path": str(shard(run.parent / "data")), "sha256": entry.sha256, "reason": "sha256",
        "actual": row["actual"], "samples": needing(run),
    }  # fmt: skip
    assert row["actual"] != entry.sha256 and len(str(row["actual"])) == 64
    said = capsys.readouterr().err
    assert said.count("warning: skipping") == 1 and str(shard(run.parent / "data")) in said
    samples(run)  # a second attempt says and writes nothing new
    assert len(ledger(run)) == 1 and not capsys.readouterr().err


@pytest.mark.parametrize("reason", ["missing", "size", "index"])
def test_every_kind_of_damage_is_skipped(run: Path, reason: str) -> None:
    spoil(run.parent / "data")
    path = shard(run.parent / "data")
    if reason == "missing":
        path.unlink()
    elif reason == "size":
        path.write_bytes(path.read_bytes()[:-512])
    else:
        path.with_suffix(".idx").write_bytes(b"")
    assert blanks(samples(run, verify="off" if reason == "index" else "first"))
    assert [row["reason"] for row in ledger(run)] == [reason]


def test_a_resume_repeats_the_decision_though_the_file_is_whole_again(run: Path) -> None:
    first = samples(run)
    spoil(run.parent / "data")
    assert blanks(samples(run)) == blanks(first)
    (run / LEDGER_NAME).unlink()  # and it is the ledger that does it
    assert not blanks(samples(run))


def test_the_decision_follows_a_data_set_that_moves_but_not_one_that_is_written_again(run: Path) -> None:
    first = samples(run)
    spoil(run.parent / "data")
    (run.parent / "data").rename(run.parent / "moved")
    moved = stream(run, train=[{"path": str(run.parent / "moved")}])
    assert blanks([moved.sample(number) for number in range(len(first))]) == blanks(first)
    write_dataset(run.parent / "data", [random_documents(25, 10 + seed) for seed in range(NUM_SHARDS)])
    assert not blanks(samples(run))


def test_every_rank_decides_alike(run: Path) -> None:
    """Each of four ranks reads its own part; together they have the same blanks as one, and one line of ledger."""
    whole = blanks(samples(run))
    (run / LEDGER_NAME).unlink()
    found = set()
    for rank in range(4):
        opened = stream(run)
        found |= blanks([opened.sample(number) for number in range(rank, 80, 4)])
    assert found == {number for number in whole if number < 80}
    assert len(ledger(run)) == 1


def test_blank_samples_have_no_targets_and_count_no_tokens(run: Path) -> None:
    data = config(run)
    opened = stream(run)
    steps = BatchLoader(opened, RowConfig(data, 1, opened.eos_id), 8, 4).steps(0)
    taken = samples(run)
    for step in range(3):
        for batch in next(steps):
            for row in range(4):
                labels = batch.labels_BS[row].tolist()
                assert (set(labels) == {IGNORED_LABEL}) is taken[batch.first_sample + row].blank
            kept = sum(not taken[batch.first_sample + row].blank for row in range(4))
            assert batch.num_valid_tokens == kept * SEQ_LEN, step
    steps.close()


def test_more_than_the_share_is_refused_with_all_shards(run: Path) -> None:
    one = needing(run) / (read_manifest(run.parent / "data").stream_tokens // SEQ_LEN)
    assert blanks(samples(run, max_skipped=one))
    spoil(run.parent / "data", 1)
    with pytest.raises(DataError, match=r"data\.max_skipped") as raised:
        samples(run, max_skipped=one)
    for number in (1, SPOILED):
        assert str(shard(run.parent / "data", number)) in str(raised.value)
    assert len(ledger(run)) == 1  # what is refused is not decided
    advised = float(str(raised.value).rpartition("data.max_skipped=")[2].rstrip("."))
    assert blanks(samples(run, max_skipped=advised))
    with pytest.raises(DataError, match=r"data\.max_skipped"):
        stream(run, max_skipped=one)


def test_sources_have_shares_of_their_own(run: Path) -> None:
    """What training has lost does not count against evaluation."""
    write_dataset(run.parent / "valid", [random_documents(25, 20 + seed) for seed in range(3)])
    spoil(run.parent / "valid", 0)
    samples(run, max_skipped=0.4)
    valid = stream(run, train=[{"path": str(run.parent / "valid")}], max_skipped=0.4)
    assert blanks([valid.sample(number) for number in range(40)])
    assert len(ledger(run)) == 2


def test_a_passing_error_is_no_reason_to_skip(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmtrain.data.storage.remote.FIRST_PAUSE_SECONDS", 0.001)

    def failing(path: Path) -> str:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("llmtrain.data.storage.manifest.file_sha256", failing)
    with pytest.raises(DataError, match="Input/output error"):
        samples(run)
    assert not (run / LEDGER_NAME).exists()


def test_a_shard_that_one_rank_uses_and_another_skips_stops_the_run_once(run: Path) -> None:
    """Ranks with parts of one model would train on different samples; after a restart all go by the ledger."""
    spoil(run.parent / "data")
    used = stream(run, shuffle_shards=1)
    count = len(samples(run))
    number = 0
    while (sample := used.sample(number)).shard != SPOILED:
        number += 1
    spoil(run.parent / "data")
    other = stream(run, shuffle_shards=1)
    assert other.sample(number).blank
    with pytest.raises(DataError, match=f"{sample.shard:06d}.*another rank found it damaged"):
        for later in range(number, count + number):
            used.sample(later)
    assert stream(run, shuffle_shards=1).sample(number).blank


SHARDS = [SkippedShard(f"data/{number}.tar", "0" * 64, "1" * 64, "sha256", 1) for number in range(8)]
SOURCE = SourceSamples("data", frozenset(shard.key for shard in SHARDS), 1000)


def _add_all(path: Path, first: int) -> None:
    skipped = SkippedShards(path, 1.0)
    for number in range(8):
        skipped.add(SHARDS[(first + number) % 8], SOURCE)


def test_ranks_that_find_the_same_shards_at_once_write_each_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_add_all, args=(tmp_path / LEDGER_NAME, 2 * rank)) for rank in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert sorted(str(row["path"]) for row in ledger(tmp_path)) == [shard.path for shard in SHARDS]


def test_a_torn_line_spoils_itself_only(tmp_path: Path) -> None:
    path = tmp_path / LEDGER_NAME
    SkippedShards(path, 1.0).add(SHARDS[0], SOURCE)
    with path.open("a") as file:
        file.write('{"path": "data/1.t')
    SkippedShards(path, 1.0).add(SHARDS[2], SOURCE)
    again = SkippedShards(path, 1.0)
    assert [shard.key in again for shard in SHARDS[:4]] == [True, False, True, False]


def test_a_line_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / LEDGER_NAME).write_text('{"event": "other"}\n')
    with pytest.raises(DataError, match=rf"{LEDGER_NAME}:1: not a skipped shard"):
        SkippedShards(tmp_path / LEDGER_NAME, 1.0)


def test_a_shard_is_not_skipped_without_a_record(tmp_path: Path) -> None:
    skipped = SkippedShards(tmp_path / "absent" / LEDGER_NAME, 1.0)
    with pytest.raises(DataError, match="cannot be written"):
        skipped.add(SHARDS[0], SOURCE)
    assert SHARDS[0].key not in skipped


def test_blank_tokens_are_in_the_vocabulary(run: Path) -> None:
    assert {int(np.unique(sample.tokens)[0]) for sample in samples(run) if sample.blank} == {3}
