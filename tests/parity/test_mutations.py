"""Code that is broken in one place: parity sees it, and says where."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest

from tests.parity.cases import parity_run, verdict


def drop_data_reduction() -> None:
    from megatron.core.distributed import DistributedDataParallel

    DistributedDataParallel.finish_grad_sync = lambda *_, **__: None


def drop_tied_embedding_reduction() -> None:
    from megatron.core.distributed.finalize_model_grads import finalize_model_grads

    finalize_model_grads.__globals__["_allreduce_word_embedding_grads"] = lambda *_, **__: None


def drop_sequence_reduction() -> None:
    from megatron.core.distributed.finalize_model_grads import finalize_model_grads

    finalize_model_grads.__globals__["_allreduce_non_tensor_model_parallel_grads"] = lambda *_, **__: None


def split_the_wrong_dimension() -> None:
    """A square weight: read and written back by rows, used by columns."""
    from llmtrain.engines import part

    original, out = part.split_box, (32, 32)

    def by_rows(shape: tuple[int, ...], cuts: Mapping[int, tuple[int, int]]) -> Any:
        return original(shape, {0: next(iter(cuts.values()))} if shape == out and cuts else cuts)

    part.split_box = by_rows


def draw_from_local_indices() -> None:
    from llmtrain.parallel.stateless_random import Draws

    Draws.with_sequence = lambda self, _: self


def swap_shards() -> None:
    from llmtrain.engines import part

    original, up = part.split_box, (128, 32)

    def swapped(shape: tuple[int, ...], cuts: Mapping[int, tuple[int, int]]) -> Any:
        other = {dim: (ranks - 1 - rank, ranks) for dim, (rank, ranks) in cuts.items()}
        return original(shape, other if shape == up else cuts)

    part.split_box = swapped


def skip_the_exchange_of_heads() -> None:
    from llmtrain.engines import stage

    stage.spread_over_context = lambda kernel, group: kernel


def mean_of_means() -> None:
    """Each micro-batch normalized by its own number of targets."""
    from llmtrain.engines.megatron_engine.engine import MegatronEngine

    MegatronEngine.sum_over_data = lambda self, count: count


MUTATIONS: list[tuple[Callable[[], None], dict[str, Any], str, str]] = [
    (drop_data_reduction, {}, "llama", "gradient"),
    (drop_tied_embedding_reduction, {"pipeline": 2}, "llama", "gradient of embeddings.word.weight"),
    (drop_sequence_reduction, {"tensor": 2, "sequence": True}, "llama", "norm.weight"),
    (split_the_wrong_dimension, {"tensor": 2}, "llama", "loss of step 1"),
    (swap_shards, {"tensor": 2}, "llama", "loss of step 1"),
    (draw_from_local_indices, {"tensor": 2, "sequence": True}, "dropout", "loss of step 1"),
    (draw_from_local_indices, {"context": 2}, "dropout", "loss of step 1"),
    (skip_the_exchange_of_heads, {"context": 2}, "llama", "loss of step 1"),
    (mean_of_means, {}, "llama", "loss of step 1"),
]


@pytest.mark.parametrize(
    ("mutation", "parallel", "model", "named"), MUTATIONS, ids=[f"{m.__name__}-{p}" for m, p, _, _ in MUTATIONS]
)
def test_broken_code_is_caught(mutation: Callable[[], None], parallel: dict[str, Any], model: str, named: str) -> None:
    config = parity_run(model)
    layout = config.with_keys({"engine": {"name": "megatron", "zero_stage": 0}, "parallel": parallel})
    problems = verdict(config, layout, 2, num_steps=2, mutation=mutation).problems
    assert any(named in problem for problem in problems), problems
