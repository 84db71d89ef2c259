"""What is done otherwise on a GPU, done on the CPU: the same numbers in every engine; broken, it is caught.

There the update of AdamW divides gradients by their norm over the limit, so that nothing else passes over them, and
queries, keys and values are made in one product where their weights lie side by side.
"""

from collections.abc import Callable
from typing import Any

import pytest

from tests.parity.cases import parity_run, verdict
from tests.parity.test_megatron import LAYOUTS


def as_on_a_gpu() -> None:
    from llmtrain.engines.step import SteppingEngine

    build: Any = SteppingEngine.__init__

    def built(self: Any, *arguments: Any) -> None:
        build(self, *arguments)
        self.clips_in_update = True
        self.joins_projections = self.config.engine.zero_stage < 3

    SteppingEngine.__init__ = built  # type: ignore[method-assign]


def joint_gradients_are_mixed_up() -> None:
    from llmtrain.models.attention.joint_product import JointProduct

    as_on_a_gpu()
    backward: Any = JointProduct.backward

    def spoiled(ctx: Any, *grads: Any) -> Any:
        found = [*backward(ctx, *grads)]
        found[3] = found[3] * 1.01
        return tuple(found)

    JointProduct.backward = staticmethod(spoiled)  # type: ignore[method-assign]  # broken on purpose


def run_of(engine: str, layout: str, zero_stage: int, model: str = "llama", **keys: Any) -> tuple[Any, Any, int]:
    """(the reference's run, the layout's, its ranks). The limit of the norm is one that every step is above."""
    ranks, parallel = LAYOUTS[layout]
    config = parity_run(model).with_keys({"optim.grad_clip": 0.1, **keys})
    return config, config.with_keys({"engine": {"name": engine, "zero_stage": zero_stage}, "parallel": parallel}), ranks


@pytest.mark.parametrize(
    ("engine", "layout", "zero_stage", "model"),
    [
        ("torch", "dp2", 0, "gpt"),
        ("megatron", "dp2+pp2", 1, "llama"),
        ("deepspeed", "dp2", 2, "gpt"),
        pytest.param("megatron", "pp2+vp2", 0, "gpt", marks=pytest.mark.whole_grid),
        pytest.param("megatron", "tp2+sp", 1, "llama", marks=pytest.mark.whole_grid),
        *(pytest.param("deepspeed", "dp2", stage, "llama", marks=pytest.mark.whole_grid) for stage in (0, 1, 3)),
    ],
)
def test_fp32_equals_one_process(engine: str, layout: str, zero_stage: int, model: str) -> None:
    config, other, ranks = run_of(engine, layout, zero_stage, model)
    assert verdict(config, other, ranks, mutation=as_on_a_gpu).problems == []


@pytest.mark.parametrize(
    ("mutation", "engine", "zero_stage", "optimizer"),
    [
        (joint_gradients_are_mixed_up, "torch", 0, "adamw"),
        (joint_gradients_are_mixed_up, "megatron", 1, "adamw"),
        (joint_gradients_are_mixed_up, "deepspeed", 2, "adamw"),
        (as_on_a_gpu, "megatron", 0, "lion"),  # it divides nothing, and is not asked to on a GPU
    ],
)
def test_what_is_broken_is_caught(mutation: Callable[[], None], engine: str, zero_stage: int, optimizer: str) -> None:
    config, other, ranks = run_of(engine, "dp2", zero_stage, **{"optim.name": optimizer, "optim.lr": 3e-4})
    assert verdict(config, other, ranks, mutation=mutation).problems != []
