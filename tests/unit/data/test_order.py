import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.data.bijection import KeyedBijection, keyed_permutation
from llmtrain.data.order import Place, SampleOrder
from llmtrain.values.keyed_hash import wide_key

SEQ_LEN = 16


@given(size=st.integers(1, 3000), seed=st.integers(0, 2**40))
@settings(max_examples=60, deadline=None)
def test_bijection_reaches_every_element_once(size: int, seed: int) -> None:
    bijection = KeyedBijection(size, wide_key("test", seed))
    assert sorted(map(bijection, range(size))) == list(range(size))


@given(size=st.integers(1, 3000) | st.integers(2**62, 2**63), seed=st.integers(0, 2**40), data=st.data())
@settings(max_examples=60, deadline=None)
def test_images_are_the_same_one_by_one_and_in_blocks(size: int, seed: int, data: st.DataObject) -> None:
    key = wide_key("test", seed)
    used = KeyedBijection(size, key)
    for _ in range(3):
        first = data.draw(st.integers(0, size - 1))
        for index in range(first, min(first + 300, size)):
            assert used(index) == KeyedBijection(size, key)(index)


def test_bijection_mixes() -> None:
    """Neighbours land far apart, each input hits each tenth of the range equally often, and keys do not correlate."""
    size = 10_000
    first, second = (np.array([*map(KeyedBijection(size, wide_key("test", seed)), range(size))]) for seed in (1, 2))
    assert np.abs(np.diff(first)).mean() == pytest.approx(size / 3, rel=0.05)
    assert abs(np.corrcoef(first, np.arange(size))[0, 1]) < 0.04
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.04
    counts, _, _ = np.histogram2d(np.arange(size), first, bins=10)
    assert (((counts - 100) ** 2) / 100).sum() < 160  # chi-squared with about 81 degrees of freedom


def test_small_sizes_use_many_permutations() -> None:
    seen = {tuple(KeyedBijection(3, wide_key("test", seed))(i) for i in range(3)) for seed in range(200)}
    assert len(seen) == 6
    seen = {tuple(keyed_permutation(3, wide_key("test", seed)).tolist()) for seed in range(200)}
    assert len(seen) == 6


def test_order_is_pinned() -> None:
    """A run must find its samples again with a later version: these numbers must never change."""
    order = SampleOrder([5, 0, 9, 3], SEQ_LEN, seed=1234, source=0, group_size=2)
    assert [order.place(n) for n in (0, 1, 16, 17, 1000)] == [
        Place(0, 0, 1),
        Place(0, 0, 2),
        Place(0, 3, 0),
        Place(1, 2, 1),
        Place(58, 0, 1),
    ]
    assert KeyedBijection(1000, wide_key("pinned", 7))(123) == 260


windows_lists = st.lists(st.integers(0, 12), min_size=1, max_size=8).filter(lambda windows: sum(windows) > 0)


@given(windows=windows_lists, seed=st.integers(0, 100), group_size=st.integers(1, 9), epoch=st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_every_epoch_is_a_permutation_of_all_windows(
    windows: list[int], seed: int, group_size: int, epoch: int
) -> None:
    order = SampleOrder(windows, SEQ_LEN, seed, 0, group_size)
    size = order.num_windows
    places = [order.place(number) for number in range(epoch * size, (epoch + 1) * size)]
    assert {place.epoch for place in places} == {epoch}
    every_window = [(shard, window) for shard, count in enumerate(windows) for window in range(count)]
    assert sorted((place.shard, place.window) for place in places) == every_window


def test_a_group_of_shards_is_finished_before_the_next_begins() -> None:
    order = SampleOrder([10] * 6, SEQ_LEN, seed=5, source=0, group_size=2)
    shards = [order.place(number).shard for number in range(60)]
    groups = [set(shards[begin : begin + 20]) for begin in (0, 20, 40)]
    assert [len(group) for group in groups] == [2, 2, 2]
    assert set.union(*groups) == set(range(6))
    assert shards[:20] != sorted(shards[:20])  # shuffled inside the group, not shard after shard


def test_epochs_seeds_and_sources_have_different_orders() -> None:
    def first_epoch(seed: int, source: int, epoch: int) -> list[tuple[int, int]]:
        order = SampleOrder([20, 20], SEQ_LEN, seed, source, 8)
        return [(p.shard, p.window) for p in map(order.place, range(epoch * 40, epoch * 40 + 40))]

    orders = [first_epoch(*key) for key in ((1, 0, 0), (2, 0, 0), (1, 1, 0), (1, 0, 1))]
    assert len({tuple(order) for order in orders}) == 4


def test_a_place_does_not_depend_on_what_was_asked_before() -> None:
    windows = [7, 3, 11]
    asked_at_once = SampleOrder(windows, SEQ_LEN, 3, 0, 2)
    numbers = list(range(200))
    np.random.default_rng(0).shuffle(numbers)
    scattered = {number: asked_at_once.place(number) for number in numbers}
    assert all(SampleOrder(windows, SEQ_LEN, 3, 0, 2).place(number) == place for number, place in scattered.items())


def test_broken_permutation_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The permutation property is not vacuous: a network that forgets to walk leaves the range."""
    monkeypatch.setattr(KeyedBijection, "__call__", lambda self, index: index // 2)
    order = SampleOrder([4, 4], SEQ_LEN, 1, 0, 2)
    assert len({(order.place(n).shard, order.place(n).window) for n in range(8)}) < 8
