"""Every optimizer of the table, in every engine and layout, against one process; broken ones are caught."""

from collections.abc import Callable
from typing import Any

import pytest

from llmtrain.checks.parity.layouts import STEADY_LR
from llmtrain.config.schema import RunConfig
from llmtrain.optim.table import OPTIMIZERS
from tests.parity import test_deepspeed, test_megatron
from tests.parity.cases import parity_run, short_and_whole, verdict

OTHERS = [name for name in OPTIMIZERS if name != "adamw"]
"""AdamW is what all the other tests of this folder train with."""

ENGINES: dict[str, tuple[dict[str, tuple[int, dict[str, Any]]], tuple[int, ...]]] = {
    "megatron": (test_megatron.LAYOUTS, (0, 1)),
    "deepspeed": (test_deepspeed.LAYOUTS, (0, 1, 2, 3)),
}
"""The layouts and ZeRO stages that AdamW is tried in."""

GRID = [
    (engine, layout, zero, optimizer)
    for engine, (layouts, stages) in ENGINES.items()
    for layout in layouts
    for zero in stages
    for optimizer in OTHERS
]

PAIRWISE = [
    (engine, layout, zero, optimizer)
    for engine, layout, zero in (
        *(("megatron", "dp2", 1), ("megatron", "tp2+sp", 0), ("megatron", "pp2+vp2", 1), ("megatron", "cp2", 0)),
        *(("deepspeed", "dp2", 0), ("deepspeed", "tp2+sp", 1), ("deepspeed", "cp2", 2), ("deepspeed", "dp2", 3)),
    )
    for optimizer in OTHERS
]


def optimized(name: str, model: str = "llama", **settings: Any) -> RunConfig:
    return parity_run(model).with_keys({"optim.name": name, "optim.lr": STEADY_LR[name], **settings})


@pytest.mark.parametrize(("engine", "layout", "zero_stage", "optimizer", "num_steps"), short_and_whole(PAIRWISE, GRID))
def test_fp32_equals_one_process(engine: str, layout: str, zero_stage: int, optimizer: str, num_steps: int) -> None:
    ranks, parallel = ENGINES[engine][0][layout]
    config = optimized(optimizer)
    other = config.with_keys({"engine": {"name": engine, "zero_stage": zero_stage}, "parallel": parallel})
    assert verdict(config, other, ranks, num_steps).problems == []


@pytest.mark.parametrize("optimizer", OTHERS)
@pytest.mark.parametrize("zero_stage", [2, pytest.param(3, marks=pytest.mark.whole_grid)])
def test_offload_to_the_cpu_changes_nothing(optimizer: str, zero_stage: int) -> None:
    config = optimized(optimizer)
    other = config.with_keys(
        {"engine": {"name": "deepspeed", "zero_stage": zero_stage, "offload": "cpu"}, "parallel": {}}
    )
    assert verdict(config, other, 2).problems == []


def momentum_is_forgotten() -> None:
    from llmtrain.optim.lion import Lion

    step: Any = Lion.step

    def forgetful(self: Any, closure: None = None) -> None:
        step(self)
        for state in self.state.values():
            state["exp_avg"].zero_()

    Lion.step = forgetful  # type: ignore[method-assign]  # broken on purpose


def another_decay() -> None:
    from llmtrain.optim import table

    table.OPTIMIZERS["lion"] = table.OPTIMIZERS["adamw"]


@pytest.mark.parametrize(("mutation", "engine"), [(momentum_is_forgotten, "deepspeed"), (another_decay, "megatron")])
def test_another_update_is_caught(mutation: Callable[[], None], engine: str) -> None:
    config = optimized("lion")
    other = config.with_keys({"engine": {"name": engine, "zero_stage": 1}, "parallel": {}})
    assert any("after the last step" in problem for problem in verdict(config, other, 2, mutation=mutation).problems)
