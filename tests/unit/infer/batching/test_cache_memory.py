"""What a batch says that its cache takes, before it begins, is what the stores of its layers have taken in the end."""

from collections.abc import Iterator

import pytest
from torch import Tensor

from llmtrain.infer.batching.batch import ContinuousBatch
from llmtrain.infer.batching.request import Request
from llmtrain.infer.batching.sampling import Sampling
from llmtrain.infer.batching.scheduler import Limits
from llmtrain.models.attention.caches import BlockStore, StateStore
from llmtrain.models.attention.rows import BLOCK
from tests.unit.infer.batching.test_batch import CASES, built


def tensors_of(batch: ContinuousBatch) -> Iterator[Tensor]:
    for store in (*batch.arena.own, *batch.arena.cross):
        if isinstance(store, BlockStore):
            assert store.pair is not None, "each layer has seen a text"
            yield from store.pair
        elif isinstance(store, StateStore):
            assert store.sums is not None
            yield store.sums


@pytest.mark.parametrize("case", CASES)
def test_a_cache_takes_what_was_said(case: str) -> None:
    model = built(**CASES[case])
    limits = Limits.of(model.config, slots=3, positions=2 * BLOCK)
    batch = ContinuousBatch(model, limits)
    prompt, source = ((0,), (5, 6, 7)) if model.has_memory else ((5, 6, 7), ())
    batch.add(Request(prompt, 3, Sampling(0), source=source))
    while not batch.is_idle:
        batch.step()
    taken = sum(tensor.numel() * tensor.element_size() for tensor in tensors_of(batch))
    assert taken == limits.cache_bytes(model.config) > 0
