"""Legal layouts of legal models drawn at random, each to be compared with one process.

A draw is made of a seed and a number alone, so that a case that differs can be made again.
"""

import random
from dataclasses import dataclass, replace
from itertools import product
from math import prod
from typing import Any

from llmtrain.checks.parity.compare import FP32, LOW_PRECISION, Levels
from llmtrain.checks.parity.layouts import STEADY_EPS, build_candidate, short_name
from llmtrain.config.rules.arithmetic import arithmetic_problems
from llmtrain.config.schema import LossScaleConfig, RunConfig
from tests.parity.cases import DATA, MODELS, SHORT_STEPS
from tests.support.samples import tiny_model, tiny_run

MAX_RANKS = 4
SIZES = [sizes for sizes in product((1, 2, 3, 4), repeat=4) if 1 < prod(sizes) <= MAX_RANKS]
"""Of the tensor, context, pipeline and data axes."""

TRIES = 200
"""So often a layout is drawn for a model and an engine, before both are drawn again."""

ENGINES = ("megatron",) * 6 + ("deepspeed",) * 3 + ("torch",)
"""What an engine is drawn from: the one with most layouts most often."""

DENSE = replace(LOW_PRECISION, weight=1.0)
"""Models without experts in bf16 and fp16. Adam's first steps are the signs of gradients, and rounding turns the signs
of small ones: a norm's bias, which begins at 0, is after three steps what those signs are."""

ROUTED = Levels(first_loss=2e-2, loss=5e-2, grad_norm=1.0, gradient=10.0, weight=10.0, experts=10.0, floor=1e-3)
"""Experts in bf16 and fp16: rounding sends a token to another expert, so that losses are close and gradients need not
be."""


@dataclass(frozen=True)
class Case:
    """`alone` is what one process does, `layout` what `world_size` ranks do of it."""

    name: str
    alone: RunConfig
    layout: RunConfig
    world_size: int
    num_steps: int = SHORT_STEPS

    @property
    def levels(self) -> Levels:
        """How close the two must be."""
        if self.alone.train.precision == "fp32":
            return FP32
        return ROUTED if self.alone.model.moe else DENSE


def draw_case(seed: int, number: int) -> Case:
    """Case `number` of a seed: drawn again and again until it keeps the rules."""
    draw = random.Random(f"{seed} {number}")
    while True:
        name, alone = draw_run(draw)
        engine = draw.choice(ENGINES)
        if arithmetic_problems(alone, 1):
            continue
        for _ in range(TRIES):
            case = draw_layout(draw, name, alone, engine)
            if not arithmetic_problems(case.layout, case.world_size):
                return case


def draw_run(draw: random.Random) -> tuple[str, RunConfig]:
    """A small model of any family, and how it is trained."""
    name = draw.choice([name for name in MODELS if name != "relu"])
    model = {**MODELS[name], **draw_changes(draw, MODELS[name])}
    micro_batch_size = draw.choice((1, 2, 3))
    train = {
        "micro_batch_size": micro_batch_size,
        "global_batch_size": micro_batch_size * draw.choice((4, 6, 8, 12)),
        "precision": draw.choice(("fp32", "fp32", "fp32", "fp32", "bf16", "fp16")),
    }
    optim = {"grad_clip": draw.choice((0.0, 0.1, 1.0)), "weight_decay": draw.choice((0.0, 0.1))}
    fixed = {"lr": 1e-3, "eps": STEADY_EPS, "loss_scale": LossScaleConfig(initial=1024.0)}
    run = tiny_run(tiny_model(**model), train, {**optim, **fixed})
    data = {**DATA.get(name, {}), "reset_attention": name not in DATA and draw.random() < 0.3}
    return name, run.with_keys({"data": run.data.with_keys(data)})


def draw_changes(draw: random.Random, model: dict[str, Any]) -> dict[str, Any]:
    """What differs from the model of that name; it may break rules."""
    changes: dict[str, Any] = {
        "num_layers": draw.choice((2, 3, 4)),
        "dropout": draw.choice((0.0, 0.1)),
        "num_kv_heads": draw.choice((1, 2, 4)),
    }
    if model.get("family") == "encoder_decoder":
        changes["num_encoder_layers"] = draw.choice((1, 2, 3))
    if "family" not in model:
        changes |= {
            "tie_embeddings": draw.random() < 0.5,
            "norm_position": draw.choice(("pre", "pre", "post")),
            "activation": draw.choice(("swiglu", "geglu", "gelu")),
            "attention_dropout": draw.choice((0.0, 0.0, 0.1)),
        }
    if "moe" in model:
        moe = {**model["moe"], "every_n_layers": draw.choice((1, 2, 3))}
        if moe.get("router") != "switch":
            moe |= {"top_k": draw.choice((1, 2)), "capacity_factor": draw.choice((None, None, 1.0))}
        changes["moe"] = moe
    return changes


def draw_layout(draw: random.Random, name: str, alone: RunConfig, engine: str) -> Case:
    """Ranks and what else must not change the numbers; it may break rules."""
    tensor, context, pipeline, data = draw.choice(SIZES)
    virtual = draw.choice((1, 2))
    parallel = {
        "tensor": tensor,
        "context": context,
        "pipeline": pipeline,
        "virtual_pipeline": virtual,
        "expert": draw.choice((1, 2, 4)) if alone.model.moe else 1,
        "sequence": draw.random() < 0.5,
        "overlap_grad_reduce": draw.random() < 0.2,
        "pipeline_split": draw_split(draw, pipeline * virtual, alone.model.total_layers),
    }
    offload = draw.choice(("none", "none", "none", "cpu"))
    parallel["context_exchange"] = draw.choice((None, None, "ring")) if context > 1 else None
    settings = {"name": engine, "zero_stage": draw.randrange(4), "offload": offload}
    recompute = draw.choice(("none", "none", "selective", "full"))
    if pipeline > 1 and virtual == 1 and draw.random() < 0.5:
        parallel["pipeline_schedule"] = "zero_bubble"
    run = alone.with_keys({"train.recompute": recompute})
    candidate = build_candidate(run, settings, parallel, data)
    shown = short_name(candidate.config.parallel, candidate.config.engine, data)
    title = f"{name}-{shown}-{alone.train.precision}-{recompute}"
    return Case(title, alone, candidate.config, candidate.world_size)


def draw_split(draw: random.Random, chunks: int, num_layers: int) -> tuple[int, ...] | None:
    """Layers of each chunk, as uneven as they may be, or none."""
    if chunks == 1 or draw.random() < 0.5:
        return None
    cuts = sorted(draw.randint(0, num_layers) for _ in range(chunks - 1))
    return tuple(end - start for start, end in zip((0, *cuts), (*cuts, num_layers), strict=True))
