"""Frozen parameters in every engine and layout: the numbers of one process, and weights that stay what they were."""

from itertools import cycle
from typing import Any

import pytest
import torch

from llmtrain.checks.parity.batches import probe_batches
from llmtrain.config.parameters import declare_parameters
from llmtrain.config.schema import RunConfig
from llmtrain.models.init import InitialWeights
from llmtrain.parallel.layout import plan_layout
from llmtrain.train.setup import engine_class
from llmtrain.values.fragment import Box
from tests.parity import test_deepspeed, test_megatron
from tests.parity.cases import parity_run, short_and_whole, verdict
from tests.support.ranks import run_ranks

FROZEN: dict[str, tuple[str, ...]] = {
    "llama": ("embeddings.*", "decoder.layers.0.*"),
    "gpt": ("decoder.layers.0.*", "decoder.layers.1.*", "embeddings.*", "*norm*"),
    "dropout": ("*.attention.q.weight", "*.mlp.*"),
    "top_2": ("*.moe.experts.*", "*_norm.weight"),
    "t5": ("*position_bias*", "encoder.*"),
}
"""Of each model: tied embeddings; all of a first stage; parts of layers; experts; a bias on all stages."""

LAYOUTS = {
    **{f"megatron:{name}": ("megatron", *layout) for name, layout in test_megatron.LAYOUTS.items()},
    "megatron:dp2+ep2": ("megatron", 2, {"expert": 2}),
    "deepspeed:dp2+ep2": ("deepspeed", 2, {"expert": 2}),
    **{f"deepspeed:{name}": ("deepspeed", *layout) for name, layout in test_deepspeed.LAYOUTS.items()},
    "torch:dp2": ("torch", 2, {}),
}
STAGES = {"megatron": (0, 1), "deepspeed": (0, 1, 2, 3), "torch": (0,)}

PLACES = [
    (layout, stage)
    for layout, (engine, _, parallel) in LAYOUTS.items()
    for stage in STAGES[engine]
    if "expert" not in parallel
]
GRID = [(model, *place) for model, place in zip(cycle(("llama", "gpt", "dropout")), PLACES, strict=False)]
"""Every layout and stage, the models by turns."""

PAIRWISE = [
    *(("llama", "torch:dp2", 0), ("llama", "megatron:tp2+sp", 1), ("llama", "megatron:pp2", 0)),
    *(("gpt", "megatron:pp2+vp2", 1), ("dropout", "megatron:cp2", 1), ("gpt", "deepspeed:dp2", 0)),
    *(("dropout", "deepspeed:tp2+sp", 1), ("llama", "deepspeed:cp2", 2), ("gpt", "deepspeed:dp2", 3)),
    ("gpt", "megatron:pp2", 1),
    *(("top_2", "megatron:dp2+ep2", 1), ("top_2", "deepspeed:dp2+ep2", 1), ("t5", "megatron:pp2", 0)),
]


def frozen_run(model: str, **keys: Any) -> RunConfig:
    return parity_run(model).with_keys({"optim.freeze": FROZEN[model], **keys})


def laid_out(config: RunConfig, layout: str, stage: int, **more: Any) -> tuple[RunConfig, int]:
    engine, ranks, parallel = LAYOUTS[layout]
    section = {"name": engine, "zero_stage": stage, **more}
    return config.with_keys({"engine": section, "parallel": parallel}), ranks


@pytest.mark.parametrize(("model", "layout", "stage", "num_steps"), short_and_whole(PAIRWISE, GRID))
def test_fp32_equals_one_process(model: str, layout: str, stage: int, num_steps: int) -> None:
    config = frozen_run(model)
    assert verdict(config, *laid_out(config, layout, stage), num_steps=num_steps).problems == []


def frozen_parts(rank: int, world_size: int, config: RunConfig) -> tuple[list[Any], set[str]]:
    """After two steps: name, place, type and data of what is frozen, and the names of what would be saved."""
    place = plan_layout(config.parallel, world_size).coordinates(rank).data
    layout = plan_layout(config.parallel, world_size)
    engine = engine_class(config.engine.name)(config, torch.device("cpu"))
    for step in (1, 2):
        engine.train_step(step, probe_batches(config, step, place, layout.data), 1e-3)
    held = [f for master in engine.frozen() for f in master.fragments("weight", master.weight)]
    assert all(not master.moments and master.grad is None for master in engine.frozen())
    parts = [(f.name, f.box, str(f.tensor.dtype), f.tensor.float().clone()) for f in held]
    return parts, {fragment.name for fragment in engine.fragments()}


@pytest.mark.parametrize(
    ("layout", "stage", "precision"),
    [
        ("torch:dp2", 0, "bf16"), ("megatron:tp2+sp", 1, "bf16"), ("deepspeed:dp2", 3, "bf16"),
        ("deepspeed:dp2", 2, "fp32"),
    ],
)  # fmt: skip
def test_frozen_weights_stay_and_are_held_once_in_the_training_precision(
    layout: str, stage: int, precision: str
) -> None:
    config, ranks = laid_out(frozen_run("llama", **{"train.precision": precision}), layout, stage)
    source, declared = InitialWeights(config.model, config.seed), declare_parameters(config.model)
    frozen = {name for name in declared if name in config.frozen}
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    held = run_ranks(frozen_parts, ranks, config)
    for parts, saved in held:
        assert saved == set(declared) - frozen or layout == "torch:dp2" or saved < set(declared) - frozen
        for name, box, kind, data in parts:
            assert kind == str(dtype)
            assert torch.equal(data, source.read(name, "master", box).to(dtype).float()), name
    assert {name for parts, _ in held for name, *_ in parts} == frozen
    elements = sum(Box.whole(declared[name].shape).num_elements for name in frozen)
    sizes = [sum(data.numel() for *_, data in parts) for parts, _ in held]
    if stage == 3:  # sharded as the rest: together the ranks hold each element once
        assert sum(sizes) == elements
    elif "tp2" in layout:
        assert elements / 2 <= sizes[0] < elements
    else:
        assert sizes == [elements] * ranks


def a_frozen_weight_is_trained() -> None:
    from llmtrain.engines import stage

    stage.freeze = lambda parameters, patterns: None


def test_a_frozen_weight_that_moves_is_caught() -> None:
    config = frozen_run("llama")
    problems = verdict(config, *laid_out(config, "megatron:dp2", 0), mutation=a_frozen_weight_is_trained).problems
    assert problems
