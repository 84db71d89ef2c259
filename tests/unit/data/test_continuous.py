"""The order of samples that cross the ends of shards: pure arithmetic, tried on lengths of every kind."""

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.data.order import ContinuousOrder, Place

lengths_lists = st.lists(st.integers(0, 40), min_size=1, max_size=9).filter(lambda lengths: sum(lengths) > 12)


def targets(order: ContinuousOrder, number: int) -> list[tuple[int, int]]:
    """Shard and place in it of each token of a sample but the first."""
    parts = order.parts(order.place(number))
    return [(part.shard, token) for part in parts for token in range(part.begin, part.end)][1:]


@given(
    lengths=lengths_lists,
    seq_len=st.integers(1, 12),
    seed=st.integers(0, 99),
    group_size=st.integers(1, 10),
    first_epoch=st.sampled_from((0, 1, 7, 10**9)),
)
@settings(max_examples=150, deadline=None)
def test_all_tokens_are_targets_equally_often(
    lengths: list[int], seq_len: int, seed: int, group_size: int, first_epoch: int
) -> None:
    """Over seq_len epochs, which begin and end with a sample, each token exactly seq_len times."""
    order = ContinuousOrder(lengths, seq_len, seed, 0, group_size)
    total = sum(lengths)
    first = first_epoch * total  # seq_len epochs are `total` samples
    counts = Counter(token for number in range(first, first + total) for token in targets(order, number))
    # But for the very first token, which no sample before these has had; the last sample has that of the next epoch.
    tokens = [(shard, token) for shard, length in enumerate(lengths) for token in range(length)]
    differing = sorted(counts[token] - seq_len for token in tokens if counts[token] != seq_len)
    assert differing in ([], [-1, 1]) and set(counts) <= set(tokens)


@given(lengths=lengths_lists, seq_len=st.integers(1, 12), group_size=st.integers(1, 10), data=st.data())
@settings(max_examples=100, deadline=None)
def test_a_place_depends_on_its_number_only(
    lengths: list[int], seq_len: int, group_size: int, data: st.DataObject
) -> None:
    used = ContinuousOrder(lengths, seq_len, 3, 0, group_size)
    numbers = data.draw(st.lists(st.integers(0, 10**12) | st.integers(0, 60), min_size=1, max_size=12))
    for number in numbers:
        fresh = ContinuousOrder(lengths, seq_len, 3, 0, group_size)
        assert used.place(number) == fresh.place(number)
        assert used.parts(used.place(number)) == fresh.parts(fresh.place(number))


@given(lengths=lengths_lists, seq_len=st.integers(1, 12), group_size=st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_only_the_last_sample_of_a_group_reaches_into_the_next(
    lengths: list[int], seq_len: int, group_size: int
) -> None:
    """So reading stays within a group's shards, and what is read ahead is what comes."""
    order = ContinuousOrder(lengths, seq_len, 5, 0, group_size)
    groups = -(-len(lengths) // group_size)
    number, earlier, ahead = 0, -1, set(range(len(lengths)))
    needed: dict[int, set[int]] = {}
    while number < 2 * sum(lengths) // seq_len:
        epoch, _, group = order._locate(number)
        found = [{part.shard for part in order.parts(order.place(n))} for n in range(group.first, group.end)]
        own: set[int] = set().union(*found[:-1])
        assert group.first == number and {order.place(n).epoch for n in range(number, group.end)} == {epoch}
        assert len(own) <= group_size and not own & needed.get(epoch, set())
        assert max(map(len, found)) <= order.most_shards()
        if epoch * groups + group.number == earlier + 1:  # groups of tiny shards may have no sample
            assert own <= ahead
        needed.setdefault(epoch, set()).update(own)
        earlier, number = epoch * groups + group.number, group.end
        ahead = set(order.coming_shards(number - 1)[0])


def test_the_order_is_shuffled_and_pinned() -> None:
    """A run must find its samples again with a later version: these numbers must never change."""
    order = ContinuousOrder([90, 0, 161, 50], 16, seed=1234, source=0, group_size=2)
    assert [order.place(n) for n in (0, 1, 2, 17, 18, 19, 1000)] == [
        Place(0, 0, 1),
        Place(0, 0, 2),
        Place(0, 0, 3),
        Place(0, 2, 9),
        Place(0, 3, 2),
        Place(1, 2, 0),
        Place(53, 0, 2),
    ]
    places = [order.place(n) for n in range(order.num_windows)]
    assert len(set(places)) == len(places) and places != sorted(places, key=lambda p: (p.shard, p.window))
    assert [order.windows_of(shard) for shard in range(4)] == [7, 1, 12, 5]
