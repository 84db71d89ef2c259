"""Whatever happens to a run, it reads one global sequence of samples: with packing, mixtures, limits and a ramp."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.config.batch_sizes import BatchSizes
from llmtrain.config.data import DataConfig
from llmtrain.data import packing, source_reader
from llmtrain.data.loader import BatchLoader, build_stream
from llmtrain.data.mixture import Mixture
from llmtrain.data.row_config import RowConfig
from llmtrain.values.batch import IGNORED_LABEL
from tests.support.datasets import EOS_ID, random_documents, write_dataset

SEQ_LEN = 24
SIZES = BatchSizes((4, 8, 12), (0, 3, 7))
STEPS = 14
SOURCES: list[dict[str, Any]] = [{"weight": 3}, {"weight": 1, "max_epochs": 1}, {"weight": 0, "max_samples": 21}]
SCHEDULE = [{"from_sample": 30, "weights": [1, 2, 2]}, {"from_sample": 90, "weights": [2, 1, 1]}]
KEYS: dict[str, dict[str, Any]] = {
    "packed": {"packing": "best_fit", "reset_attention": True},
    "packed fim": {"packing": "best_fit", "objective": "fim", "special_tokens": {"sentinels": [400, 401, 402]}},
    "windows": {},
}


@dataclass(frozen=True)
class Launch:
    """How a run is started: its data ranks and the steps that they prepare ahead."""

    ranks: int
    prefetch_steps: int


Row = tuple[Any, ...]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    for number in range(3):
        shards = [random_documents(12, 10 * number + shard, longest=60) for shard in range(3)]
        write_dataset(folder / str(number), shards)
    return folder


def loaders(folder: Path, keys: dict[str, Any], launch: Launch) -> list[BatchLoader]:
    sources = [{"path": str(folder / str(number)), **source} for number, source in enumerate(SOURCES)]
    tree = {"train": sources, "schedule": SCHEDULE, "seq_len": SEQ_LEN, "shuffle_shards": 2, **keys}
    extra = {"prefetch_steps": launch.prefetch_steps, "cache_dir": str(folder / "cache")}
    data = DataConfig.model_validate({**tree, **extra})
    found = []
    for rank in range(launch.ranks):
        stream = build_stream(data.train, data, seed=7)
        found.append(BatchLoader(stream, RowConfig(data, 7, EOS_ID), 4, 1, rank, launch.ranks).sized(SIZES))
    return found


def read(folder: Path, keys: dict[str, Any], launch: Launch, place: tuple[int, int], steps: int) -> list[list[Row]]:
    """The rows of each step, by the number of their sample, all ranks' put together by micro-batch."""
    ranks = loaders(folder, keys, launch)
    iterators = [loader.steps(place[1], place[0] + 1) for loader in ranks]
    found = []
    for step in range(place[0] + 1, place[0] + 1 + steps):
        batches = {}
        for loader, iterator in zip(ranks, iterators, strict=True):
            batches |= dict(zip(loader.own_micro_batches(step), next(iterator), strict=True))
        assert sorted(batches) == list(range(SIZES.of_step(step)))
        rows = []
        for _, batch in sorted(batches.items()):
            segments = None if batch.segments_BS is None else batch.segments_BS[0].tolist()
            rows.append((batch.first_sample, batch.tokens_BS[0].tolist(), batch.labels_BS[0].tolist(), segments))
        found.append(rows)
    for iterator in iterators:
        iterator.close()
    return found


ALONE = Launch(1, 0)
launches = st.builds(Launch, st.sampled_from((1, 2, 4)), st.sampled_from((0, 2)))
actions = st.lists(st.tuples(launches, st.integers(1, 5), st.integers(0, 4)), min_size=1, max_size=4)
"""Starts of a run: how, how many steps it makes, and how many of these before it is killed are not saved."""

_expected: dict[str, list[list[Row]]] = {}


def check(folder: Path, name: str, starts: list[tuple[Launch, int, int]]) -> None:
    """Every step that a run makes is that of the run that nothing happens to."""
    if name not in _expected:
        _expected[name] = read(folder, KEYS[name], ALONE, (0, 0), STEPS)
    step = position = 0
    for launch, steps, lost in starts:
        steps = min(steps, STEPS - step)
        assert read(folder, KEYS[name], launch, (step, position), steps) == _expected[name][step : step + steps]
        saved = max(0, steps - lost)
        (loader,) = loaders(folder, KEYS[name], ALONE)
        for done in range(step, step + saved):
            position += loader.step_length(position, done + 1)
        step += saved
        assert position == SIZES.before(step + 1) == loader.position_behind(0, position)


@pytest.mark.parametrize("name", KEYS)
@given(starts=actions)
@settings(max_examples=12, deadline=None)
def test_a_run_reads_one_sequence(folder: Path, name: str, starts: list[tuple[Launch, int, int]]) -> None:
    check(folder, name, starts)


def test_proportions_are_exact_at_every_step(folder: Path) -> None:
    """Sources by the numbers of their samples, counted, beside what metrics would say."""
    (loader,) = loaders(folder, KEYS["packed"], ALONE)
    stream, position, taken = loader._stream, 0, [0, 0, 0]
    for step in range(1, STEPS + 1):
        numbers = loader.step_samples(position, step)
        for number in numbers:
            taken[stream.sample(number).source] += 1
        position += loader.step_length(position, step)
        assert loader.source_tokens(position) == [SEQ_LEN * count for count in taken]
        if position == 28:  # whole periods of 3 : 1, before the third source has any
            assert taken == [21, 7, 0]
    assert taken[2] == 21, "it has given all that it may"


def test_passed_over_samples_are_not_counted(folder: Path) -> None:
    (loader,) = loaders(folder, KEYS["windows"], ALONE)
    skipping = loader.skipping([(3, 9), (5, 20), (40, 44)])
    position, taken = 0, [0, 0, 0]
    for step in range(1, 8):
        for number in skipping.step_samples(position, step):
            taken[loader._stream.sample(number).source] += 1
        position += skipping.step_length(position, step)
        assert skipping.source_tokens(position) == [SEQ_LEN * count for count in taken]
        assert set(skipping.step_samples(position, step + 1)) == set(
            skipping.step_samples(skipping.position_behind(0, SIZES.before(step + 1)), step + 1)
        )


def test_padding_is_no_target_and_belongs_to_no_document(folder: Path) -> None:
    (loader,) = loaders(folder, KEYS["packed"], ALONE)
    seen = 0
    for rows in read(folder, KEYS["packed"], ALONE, (0, 0), STEPS):
        for number, tokens, labels, segments in rows:
            sample = loader._stream.sample(number)
            filled = SEQ_LEN + 1 - sample.padding
            whole = [*tokens, sample.tokens[-1]]
            starts = set(sample.document_starts.tolist())
            for place, label in enumerate(labels):
                is_target = place + 1 < filled and place + 1 not in starts
                assert label == (whole[place + 1] if is_target else IGNORED_LABEL)
                documents = sum(start <= place for start in starts) - 1
                assert segments[place] == (documents if place < filled else -1)
            seen += sample.padding > 1
    assert seen > 5


def _walked() -> Callable[..., Any]:
    """A shard that remembers how often it was packed: a sample is then no function of its number."""
    count = iter(range(10**9))
    return lambda plan, seed, source, epoch, shard: packing.packed_shard(plan, seed, source, next(count), shard)


def _of_one_piece(mixture: Mixture, number: int) -> tuple[int, int]:
    """What the pieces before gave of a source is not counted."""
    source, turn = _source_of(mixture, number)
    piece = next(piece for piece in reversed(mixture._pieces) if piece.first <= number)
    return source, turn - piece.before[source]


_source_of = Mixture.source_of

MUTATIONS: dict[str, tuple[str, Any, str, Callable[..., Any]]] = {
    "samples before a step": ("windows", BatchSizes, "before", lambda sizes, step: (step - 1) * sizes.of_step(step)),
    "one size for all steps": ("windows", BatchSizes, "of_step", lambda sizes, step: sizes.sizes[0]),
    "samples counted from the begin of a piece": ("windows", Mixture, "source_of", _of_one_piece),
    "a packing that depends on what was read": ("packed", source_reader, "packed_shard", _walked()),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_broken_seek_is_caught(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, owner, attribute, broken = MUTATIONS[name]
    starts = [(Launch(2, 0), 5, 0), (Launch(1, 2), 5, 2), (Launch(4, 0), 4, 0)]
    check(folder, kind, starts)
    monkeypatch.setattr(owner, attribute, broken)
    with pytest.raises(AssertionError):
        check(folder, kind, starts)
