"""The norms of weights and gradients, each of its whole tensor, are those of one process in every layout."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from llmtrain.checks.parity.compare import probe_batches
from llmtrain.config.schema import RunConfig
from llmtrain.engines.tensor_norms import GRADIENTS, WEIGHTS, measuring
from llmtrain.parallel.layout import plan_layout
from llmtrain.train.setup import engine_class
from llmtrain.values.progress import StepResult
from tests.parity.cases import parity_run, reference
from tests.support.ranks import run_ranks

STEPS = 2

LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "torch dp2": (2, {"name": "torch"}, {}),
    "megatron tp2": (2, {"name": "megatron"}, {"tensor": 2}),
    "megatron tp2+sp": (2, {"name": "megatron"}, {"tensor": 2, "sequence": True}),
    "megatron pp2": (2, {"name": "megatron"}, {"pipeline": 2}),
    "megatron pp2+vp2": (2, {"name": "megatron", "zero_stage": 1}, {"pipeline": 2, "virtual_pipeline": 2}),
    "megatron cp2": (2, {"name": "megatron", "zero_stage": 1}, {"context": 2}),
    "megatron dp2 zero 1": (2, {"name": "megatron", "zero_stage": 1}, {}),
    "megatron dp2+tp2 zero 1": (4, {"name": "megatron", "zero_stage": 1}, {"tensor": 2}),
    "deepspeed dp2 zero 0": (2, {"name": "deepspeed"}, {}),
    "deepspeed dp2 zero 1": (2, {"name": "deepspeed", "zero_stage": 1}, {}),
    "deepspeed dp2 zero 2": (2, {"name": "deepspeed", "zero_stage": 2}, {}),
    "deepspeed dp2 zero 3": (2, {"name": "deepspeed", "zero_stage": 3}, {}),
    "deepspeed tp2+sp zero 2": (2, {"name": "deepspeed", "zero_stage": 2}, {"tensor": 2, "sequence": True}),
}
"""Ranks, engine and parallel section by name."""

IN_SHORT = {
    "torch dp2", "megatron tp2+sp", "megatron pp2", "megatron dp2 zero 1", "deepspeed dp2 zero 0",
    "deepspeed dp2 zero 2", "deepspeed dp2 zero 3",
}  # fmt: skip


def measured_rank(
    rank: int, world_size: int, config: RunConfig, mutation: Callable[[], None] | None
) -> list[StepResult]:
    """The steps of one rank, the last of which is measured; `mutation` first breaks something in its process."""
    if mutation:
        mutation()
    layout = plan_layout(config.parallel, world_size)
    data = (layout.coordinates(rank).data, layout.data)
    measured = config.with_keys({"observe.layer_norms_every_steps": STEPS})
    engine = measuring(engine_class(config.engine.name)(config, torch.device("cpu")), measured)
    return [
        engine.train_step(step, probe_batches(config, step, *data), config.optim.lr) for step in range(1, STEPS + 1)
    ]


def expected_norms(config: RunConfig) -> dict[str, float]:
    """From whole tensors of one process, gathered in another way."""
    trace = reference(config, STEPS)
    groups = {WEIGHTS: trace.final, GRADIENTS: trace.gradients[-1]}
    return {
        group + name: float(np.linalg.norm(tensor.astype(np.float64)))
        for group, tensors in groups.items()
        for name, tensor in tensors.items()
    }


def wrong_norms(name: str, mutation: Callable[[], None] | None = None) -> dict[str, tuple[float, float]]:
    """Norms that are not those of one process within 1e-5, with what they should be."""
    ranks, engine, parallel = LAYOUTS[name]
    config = parity_run("llama")
    first, *others = run_ranks(
        measured_rank, ranks, config.with_keys({"engine": engine, "parallel": parallel}), mutation
    )
    assert not [key for key in first[0].metrics if key.startswith((WEIGHTS, GRADIENTS))], "only every second step"
    found, expected = first[-1].metrics, expected_norms(config)
    assert set(found) == set(expected)
    assert all(rank[-1].metrics == found for rank in others)
    # The true gradient of some tensors is zero: what rounding leaves of it is bounded by the global norm.
    floor = 1e-6 * first[-1].grad_norm
    return {
        key: (found[key], norm) for key, norm in expected.items() if abs(found[key] - norm) > 1e-5 * max(norm, floor)
    }


@pytest.mark.parametrize(
    "name", [n if n in IN_SHORT else pytest.param(n, marks=pytest.mark.whole_grid) for n in LAYOUTS]
)
def test_norms_are_those_of_one_process(name: str) -> None:
    assert wrong_norms(name) == {}


def count_copies_too() -> None:
    """Every rank counts all that it holds."""
    from llmtrain.engines.megatron_engine import engine

    original: Any = engine.Master
    engine.Master = lambda *parts, owned=True: original(*parts, owned=True)  # broken on purpose


def clip_first() -> None:
    """Gradients are seen after clipping."""
    from llmtrain.engines.megatron_engine.engine import MegatronEngine

    right = MegatronEngine._gradient_fragments
    MegatronEngine._gradient_fragments = lambda self, factor: right(self, factor / 2)  # type: ignore[method-assign]  # broken on purpose


@pytest.mark.parametrize(
    ("name", "mutation", "seen_in"),
    [
        ("megatron tp2+sp", count_copies_too, "decoder.final_norm.weight"),
        ("megatron pp2", count_copies_too, "embeddings.word.weight"),
        ("megatron tp2+sp", clip_first, "decoder.layers.0.attention.q.weight"),
    ],
)
def test_a_wrong_norm_is_caught(name: str, mutation: Callable[[], None], seen_in: str) -> None:
    assert GRADIENTS + seen_in in wrong_norms(name, mutation)


def test_nothing_is_measured_unless_it_is_asked_for() -> None:
    engine: Any = object()
    assert measuring(engine, parity_run("llama")) is engine
