import threading
from itertools import islice
from pathlib import Path

import pytest
import torch

from llmtrain.config.data import DataConfig, SourceConfig
from llmtrain.data.loader import BatchLoader, build_stream
from llmtrain.data.row_config import RowConfig
from llmtrain.errors import DataError
from llmtrain.values.batch import Batch
from tests.support.datasets import random_documents, write_dataset


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dataset")
    write_dataset(folder, [random_documents(30, seed) for seed in range(3)])
    return folder


def config(dataset: Path, prefetch_steps: int = 0) -> DataConfig:
    return DataConfig(train=(SourceConfig(path=str(dataset)),), seq_len=16, prefetch_steps=prefetch_steps)


def loader(data: DataConfig, dp_rank: int = 0, dp_size: int = 1) -> BatchLoader:
    stream = build_stream(data.train, data, seed=1)
    return BatchLoader(stream, RowConfig(data, 1, stream.eos_id), 16, 2, dp_rank, dp_size)


def take(
    data: DataConfig, first_sample: int = 0, steps: int = 3, dp_rank: int = 0, dp_size: int = 1
) -> list[list[Batch]]:
    iterator = loader(data, dp_rank, dp_size).steps(first_sample)
    taken = list(islice(iterator, steps))
    iterator.close()
    return taken


def test_micro_batches_hold_the_samples_that_their_number_says(dataset: Path) -> None:
    data = config(dataset)
    stream = build_stream(data.train, data, seed=1)
    for step, micro_batches in enumerate(take(data)):
        assert [batch.first_sample for batch in micro_batches] == [16 * step + 2 * j for j in range(8)]
        for batch in micro_batches:
            for row in range(2):
                tokens = stream.sample(batch.first_sample + row).tokens
                assert batch.tokens_BS[row].tolist() == tokens[:-1].tolist()
                assert batch.labels_BS[row].tolist() == tokens[1:].tolist()


@pytest.mark.parametrize("dp_size", [1, 2, 4])
def test_every_layout_sees_the_same_micro_batches(dataset: Path, dp_size: int) -> None:
    data = config(dataset)
    whole = take(data, first_sample=32)
    ranks = [take(data, 32, dp_rank=rank, dp_size=dp_size) for rank in range(dp_size)]
    for step in range(3):
        for number, expected in enumerate(whole[step]):
            actual = ranks[number % dp_size][step][number // dp_size]
            assert actual.first_sample == expected.first_sample
            assert torch.equal(actual.tokens_BS, expected.tokens_BS)
        assert sum(len(rank[step]) for rank in ranks) == len(whole[step])


@pytest.mark.parametrize("prefetch_steps", [0, 1, 3])
def test_resume_continues_with_the_very_next_batch(dataset: Path, prefetch_steps: int) -> None:
    uninterrupted = take(config(dataset), steps=6)
    resumed = take(config(dataset, prefetch_steps), first_sample=3 * 16)
    for expected, actual in zip(uninterrupted[3:], resumed, strict=True):
        assert all(torch.equal(a.tokens_BS, b.tokens_BS) for a, b in zip(expected, actual, strict=True))


def batch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("batches")]


def test_the_thread_ends_with_the_iterator(dataset: Path) -> None:
    steps = loader(config(dataset, 2)).steps(0)
    next(steps)
    assert len(batch_threads()) == 1
    steps.close()
    assert not batch_threads()
    next(loader(config(dataset, 0)).steps(0))
    assert not batch_threads()


@pytest.mark.parametrize("prefetch_steps", [0, 2])
def test_damage_is_raised_where_the_batch_is_due(tmp_path: Path, prefetch_steps: int) -> None:
    """The error keeps its type across the thread, and the thread ends with it."""
    write_dataset(tmp_path, [random_documents(30, seed) for seed in range(3)])
    data = config(tmp_path, prefetch_steps).with_keys({"shuffle_shards": 1})
    first_shard = build_stream(data.train, data, seed=1).sample(0).shard
    damaged = tmp_path / f"shard-{(first_shard + 1) % 3:06d}.tar"
    content = bytearray(damaged.read_bytes())
    content[600] ^= 1
    damaged.write_bytes(content)
    steps = loader(data).steps(0)
    next(steps)
    with pytest.raises(DataError, match=damaged.name):
        for _ in range(100):
            next(steps)
    assert not batch_threads()


@pytest.mark.parametrize(
    ("windows", "first", "expected"),
    [
        ([], 0, [[*range(16)], [*range(16, 32)]]),
        ([(16, 40)], 0, [[*range(16)], [*range(40, 56)]]),
        ([(5, 7), (10, 30)], 0, [[*range(5), 7, 8, 9, *range(30, 38)], [*range(38, 54)]]),
        ([(10, 30), (20, 25), (28, 33), (33, 34)], 4, [[*range(4, 10), *range(34, 44)], [*range(44, 60)]]),
        ([(10, 30)], 20, [[*range(30, 46)], [*range(46, 62)]]),
        ([(40, 50)], 50, [[*range(50, 66)], [*range(66, 82)]]),
    ],
)
@pytest.mark.parametrize("prefetch_steps", [0, 2])
def test_windows_are_passed_over(
    dataset: Path, windows: list[tuple[int, int]], first: int, expected: list[list[int]], prefetch_steps: int
) -> None:
    data = config(dataset, prefetch_steps)
    stream = build_stream(data.train, data, seed=1)
    skipping = loader(data).skipping(windows[1:]).skipping(windows[:1])
    steps, position = skipping.steps(first), first
    for numbers in expected:
        rows = torch.cat([batch.tokens_BS for batch in next(steps)])
        assert rows.tolist() == [stream.sample(number).tokens[:-1].tolist() for number in numbers]
        assert [origin.number for origin in skipping.step_origins(position)] == numbers
        position += skipping.step_length(position)
        assert position == numbers[-1] + 1
    steps.close()


@pytest.mark.parametrize("dp_size", [1, 2, 4])
def test_the_same_samples_are_passed_over_in_every_layout_and_batch_size(dataset: Path, dp_size: int) -> None:
    data, window = config(dataset), (10, 30)
    stream = build_stream(data.train, data, seed=1)
    firsts = set()
    for rank in range(dp_size):
        steps = BatchLoader(stream, RowConfig(data, 1, stream.eos_id), 8, 1, rank, dp_size).skipping([window]).steps(0)
        firsts |= {batch.first_sample for micro_batches in islice(steps, 4) for batch in micro_batches}
    assert firsts == {*range(10), *range(30, 52)}


def test_the_origin_of_a_sample_is_where_it_is_read(dataset: Path) -> None:
    data = config(dataset)
    stream = build_stream(data.train, data, seed=1)
    for number in range(100):
        sample, origin = stream.sample(number), stream.origin(number)
        assert (origin.number, origin.window) == (number, sample.window)
        assert f"{origin.source}/{origin.shard}" == str(stream.shard_path(sample))
