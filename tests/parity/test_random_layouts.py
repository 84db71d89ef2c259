"""Layouts that nobody chose, beside one process.

`make test` compares a few with a fixed seed. `make test-all` draws others every time: the header names their seed, and
`LLMTRAIN_LAYOUT_SEED=<seed>` draws the same again.
"""

import os
from collections import Counter
from typing import Any

import pytest

from tests.conftest import LAYOUT_SEED_VARIABLE
from tests.parity.cases import parity_run, verdict
from tests.parity.random_layouts import Case, draw_case
from tests.support.ranks import RankError

FIXED_SEED, NUM_FIXED = 20, 5
NUM_DRAWN = 60


def problems(case: Case) -> list[str]:
    try:
        return verdict(case.alone, case.layout, case.world_size, case.num_steps, case.levels).problems
    except (RankError, ValueError) as error:
        return [str(error)]


@pytest.mark.parametrize("number", range(NUM_FIXED))
def test_a_random_layout_equals_one_process(number: int) -> None:
    case = draw_case(FIXED_SEED, number)
    assert problems(case) == [], case.name


@pytest.mark.whole_grid
@pytest.mark.parametrize("number", range(NUM_DRAWN))
def test_a_layout_never_drawn_before_equals_one_process(number: int) -> None:
    seed = int(os.environ[LAYOUT_SEED_VARIABLE])
    case = draw_case(seed, number)
    assert problems(case) == [], f"{LAYOUT_SEED_VARIABLE}={seed}, number {number}: {case.name}\n{case.layout}"


def test_draws_are_repeatable_and_meet_every_axis() -> None:
    cases = [draw_case(1, number) for number in range(150)]
    assert cases[7] == draw_case(1, 7) != draw_case(2, 7)
    met = Counter[str]()
    for case in cases:
        layout, run = case.layout, case.alone
        parallel, engine = layout.parallel, layout.engine
        axes = ("tensor", "context", "pipeline", "virtual_pipeline", "expert")
        split = parallel.pipeline_split
        met.update(axis for axis in axes if getattr(parallel, axis) > 1)
        met.update((f"{engine.name} {engine.zero_stage}", run.train.precision, case.layout.train.recompute))
        met.update((run.model.family, "experts" if run.model.moe else "dense", f"offload {engine.offload}"))
        met.update([layout.context_exchange] * (parallel.context > 1))
        met.update(["zero bubble"] * (parallel.pipeline_schedule == "zero_bubble"))
        met.update(["split"] * bool(split) + ["empty chunk"] * (0 in (split or ())))
        met.update(["sequence"] * parallel.sequence + ["tied" if run.model.tie_embeddings else "untied"])
    expected = [
        *("tensor", "context", "pipeline", "virtual_pipeline", "expert", "sequence", "split", "empty chunk"),
        *("heads", "ring", "zero bubble"),
        *("fp32", "bf16", "fp16", "none", "selective", "full", "offload cpu", "tied", "untied"),
        *("decoder", "encoder", "encoder_decoder", "experts", "dense"),
        *("torch 0", "megatron 0", "megatron 1", "deepspeed 0", "deepspeed 1", "deepspeed 2", "deepspeed 3"),
    ]
    assert [name for name in expected if not met[name]] == []


EMPTY: dict[str, Any] = {"pipeline": 2, "pipeline_split": (4, 0)}


@pytest.mark.parametrize(
    ("model", "parallel", "zero_stage"),
    [
        ("llama", EMPTY, 0),
        ("gpt", EMPTY, 1),
        pytest.param("t5", EMPTY, 1, marks=pytest.mark.whole_grid),
        pytest.param("bert", EMPTY, 0, marks=pytest.mark.whole_grid),
        pytest.param("llama", {"pipeline": 2, "pipeline_split": (0, 4)}, 1, marks=pytest.mark.whole_grid),
    ],
)
def test_a_stage_without_layers_has_only_the_head(model: str, parallel: dict[str, Any], zero_stage: int) -> None:
    """The norm before the head is applied once, and held once."""
    config = parity_run(model)
    other = config.with_keys({"engine": {"name": "megatron", "zero_stage": zero_stage}, "parallel": parallel})
    assert verdict(config, other, 2).problems == []


@pytest.mark.parametrize(("precision", "zero_stage"), [("fp32", 1), ("fp16", 0)])
def test_a_stage_without_experts_is_clipped_like_the_others(precision: str, zero_stage: int) -> None:
    config = parity_run("shared", precision)
    config = config.with_keys({"model.num_layers": 2, "optim.grad_clip": 0.01})  # only the second has experts
    other = config.with_keys(
        {"engine": {"name": "megatron", "zero_stage": zero_stage}, "parallel": {"pipeline": 2, "expert": 2}}
    )
    case = Case("experts on one stage", config, other, 4)
    assert problems(case) == []
