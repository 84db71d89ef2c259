"""Encoders, encoder-decoders and mixtures of experts in every layout and engine against one process."""

import re
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest

from llmtrain.checks.parity.compare import LOW_PRECISION
from llmtrain.checks.parity.layouts import Candidate, parse_candidate
from llmtrain.config.schema import RunConfig
from llmtrain.errors import ConfigError
from tests.parity.cases import parity_run, short_and_whole, verdict

FAMILIES = ("bert", "t5", "switch_t5", "top_1", "top_2", "shared")

MEGATRON = (
    "dp2", "tp2", "tp2+sp", "pp2", "pp2+vp2", "cp2", "dp2+ep2", "cp2+ep2", "dp4+ep2", "dp4+ep4", "dp2+tp2+ep2",
    "dp2+tp2+sp+ep2", "dp2+pp2+ep2", "dp2+cp2+ep2", "dp2+pp2", "dp2+cp2", "tp2+pp2+vp2", "tp2+sp+pp2+vp2", "cp2+tp2+sp",
    "cp2+ring", "dp2+cp2+ep2+ring", "cp2+tp2+sp+ring",
)  # fmt: skip
DEEPSPEED = (
    "dp2",
    "tp2",
    "tp2+sp",
    "cp2",
    "dp2+ep2",
    "dp4+ep2",
    "dp2+tp2+ep2",
    "dp2+tp2+sp+ep2",
    "cp2+ep2",
    "cp2+ep2+ring",
)

SHORT = {
    "bert": ("megatron:tp2+sp", "megatron:pp2+zero1", "megatron:cp2", "deepspeed:dp2+zero3"),
    "t5": (
        "megatron:tp2+sp+pp2+vp2+zero1",
        "megatron:pp2",
        "megatron:cp2",
        "deepspeed:tp2+zero2",
        "megatron:cp2+tp2+sp+ring",
    ),
    "switch_t5": ("megatron:dp2+pp2+ep2+zero1", "megatron:cp2+ep2", "deepspeed:dp2+ep2+zero2"),
    "top_1": (
        "megatron:dp4+ep2+zero1",
        "megatron:dp2+tp2+ep2",
        "deepspeed:dp2+ep2",
        "deepspeed:cp2+zero1",
    ),
    "top_2": ("megatron:dp2+tp2+sp+ep2+zero1", "megatron:tp2", "deepspeed:dp2+tp2+ep2+zero2", "deepspeed:dp2+zero3"),
    "shared": (
        "megatron:dp2+pp2+ep2+zero1",
        "megatron:dp2+cp2+ep2",
        "deepspeed:tp2+sp+zero1",
        "torch:dp2",
        "megatron:dp2+cp2+ep2+ring",
    ),
}
"""Run in `make test`: every family on every axis and engine; the whole grid runs in `make test-all`."""


def grid() -> list[tuple[str, str]]:
    """Every legal layout of every family, ZeRO's stages in turn: those are one code for all families."""
    found = [(family, "torch:dp2") for family in FAMILIES]
    for engine, layouts, stages in (("megatron", MEGATRON, 2), ("deepspeed", DEEPSPEED, 4)):
        for (place, family), (number, layout) in product(enumerate(FAMILIES), enumerate(layouts)):
            turns = [f"{engine}:{layout}{stage_name((place + number + turn) % stages)}" for turn in range(stages)]
            found += [(family, text) for text in turns if legal(family, text)][:1]
    return found


def stage_name(stage: int) -> str:
    return f"+zero{stage}" if stage else ""


def legal(family: str, text: str) -> bool:
    try:
        parse_candidate(text, parity_run(family))
    except ConfigError:
        return False
    return True


def short() -> list[tuple[str, str]]:
    return [(family, text) for family, texts in SHORT.items() for text in texts]


def candidate(family: str, text: str, **train: Any) -> tuple[RunConfig, Candidate]:
    config = parity_run(family, **train)
    return config, parse_candidate(text, config)


@pytest.mark.parametrize(("family", "text", "num_steps"), short_and_whole(short(), grid()))
def test_fp32_equals_one_process(family: str, text: str, num_steps: int) -> None:
    """Loss, norm, every gradient and weight; balancing losses and figures of the experts in every step."""
    config, layout = candidate(family, text)
    assert verdict(config, layout.config, layout.world_size, num_steps).problems == []


@pytest.mark.parametrize("text", ["megatron:pp2", "deepspeed:tp2+zero1"])
def test_relu_equals_one_process_before_rounding_crosses_its_kink(text: str) -> None:
    """Some value in a few hundred thousand lies so near to 0 that a sum in another order has another sign."""
    config, layout = candidate("relu", text)
    assert verdict(config, layout.config, layout.world_size, num_steps=2).problems == []


def test_the_short_selection_is_legal_and_meets_every_engine_axis_and_stage() -> None:
    assert all(legal(family, text) for family, text in short())
    parts = {part for _, text in short() for part in text.replace(":", "+").split("+")}
    assert {
        "torch",
        "megatron",
        "deepspeed",
        "tp2",
        "pp2",
        "vp2",
        "cp2",
        "ring",
        "ep2",
        "sp",
        "zero1",
        "zero2",
        "zero3",
    } <= parts


@pytest.mark.parametrize(("family", "text"), [("t5", "megatron:pp2"), ("top_2", "deepspeed:dp2+ep2+zero1")])
def test_bf16_stays_within_its_bounds(family: str, text: str) -> None:
    config, layout = candidate(family, text, precision="bf16")
    assert verdict(config, layout.config, layout.world_size, num_steps=3, levels=LOW_PRECISION).problems == []


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recompute_changes_nothing(recompute: str) -> None:
    _, layout = candidate("switch_t5", "megatron:dp2+pp2+ep2", recompute=recompute)
    assert verdict(parity_run("switch_t5"), layout.config, layout.world_size, num_steps=3).problems == []


@pytest.mark.whole_grid
def test_compiled_layers_with_experts_change_nothing() -> None:
    config, layout = candidate("top_2", "megatron:dp2+ep2")
    compiled = layout.config.with_keys({"train.compile": True})
    assert verdict(config, compiled, layout.world_size, num_steps=3).problems == []


def reduce_experts_over_all_replicas() -> None:
    """Ranks that hold different experts sum their gradients."""
    from llmtrain.engines.megatron_engine import engine

    original = engine.mark_parameter
    engine.mark_parameter = lambda parameter, dim, sequence, expert: original(parameter, dim, sequence, False)


def balance_by_one_part_of_the_sequence() -> None:
    """Shares of the experts are those of this rank's own tokens."""
    from llmtrain.models.experts.router import Router
    from llmtrain.parallel.parts import HeldPositions

    original: Any = Router.balance_losses

    def own_part(self: Router, logits: Any, probabilities: Any, wanted: Any, valid: Any, own: HeldPositions) -> Any:
        part = wanted.new_zeros(wanted.shape)
        for run in own.runs:
            part[run.start : run.stop] = wanted[run.start : run.stop]
        return original(self, logits, probabilities, part, valid, own)

    Router.balance_losses = own_part


def capacity_of_one_part_of_the_sequence() -> None:
    """Each rank fills the experts with its own tokens."""
    from llmtrain.parallel.parts import SequenceParts

    SequenceParts.gather = lambda self, x_s: x_s.detach().repeat(self.count, *(1 for _ in x_s.shape[1:]))


def forget_the_way_back() -> None:
    """Rows come back from their experts in the order of the experts."""
    from llmtrain.parallel import expert

    order: Any = expert.order_by_expert
    expert.order_by_expert = lambda counts, num_rows: order(counts, num_rows).sort().values


def drop_sum_of_partial_gradients() -> None:
    from llmtrain.engines.megatron_engine.engine import MegatronEngine

    right = MegatronEngine._reduced_grads
    MegatronEngine._reduced_grads = lambda self, names: [g for g in right(self, names) if g.dim() > 1]


def drop_sum_over_stages() -> None:
    from llmtrain.engines.megatron_engine.engine import MegatronEngine

    MegatronEngine._sum_over_stages = lambda self, name: None


def forget_padding() -> None:
    """An encoder's padding is seen by the decoder."""
    from llmtrain.models import transformer

    original = transformer.with_memory
    transformer.with_memory = lambda inputs, memory, segments: original(inputs, memory, None)


def enter_weights_without_sum() -> None:
    """The gradients of the router's weights stay parts."""
    from llmtrain.models.experts.mixture import MoE, identity

    original: Any = MoE.forward

    def forward(self: MoE, x: Any, valid: Any, draws: Any, balance: float) -> Any:
        enter, self.enter = self.enter, lambda y: y if y.shape[-1] == self.router.moe.num_experts else enter(y)
        try:
            return original(self, x, valid, draws, balance)
        finally:
            self.enter = enter

    MoE.forward = forward
    assert identity


MUTATIONS: list[tuple[Callable[[], None], str, str, str]] = [
    (reduce_experts_over_all_replicas, "top_2", "megatron:dp2+ep2", r"gradient of .*\.moe\.experts\."),
    (balance_by_one_part_of_the_sequence, "top_1", "megatron:cp2", "aux_loss of step 1"),
    (balance_by_one_part_of_the_sequence, "top_1", "megatron:tp2+sp", "aux_loss of step 1"),
    (capacity_of_one_part_of_the_sequence, "top_1", "megatron:cp2", "loss of step 1"),
    (forget_the_way_back, "top_2", "megatron:dp2+ep2", "loss of step 1"),
    (drop_sum_of_partial_gradients, "top_2", "megatron:tp2", "k_norm.weight in step 1"),
    (drop_sum_over_stages, "t5", "megatron:pp2+vp2", "position_bias.weight"),
    (forget_padding, "t5", "megatron:pp2", "loss of step 1"),
    (enter_weights_without_sum, "top_2", "megatron:tp2", "gradient of decoder.layers"),
]


@pytest.mark.parametrize(
    ("mutation", "family", "text", "named"), MUTATIONS, ids=[f"{m.__name__}-{t}" for m, _, t, _ in MUTATIONS]
)
def test_broken_code_is_caught(mutation: Callable[[], None], family: str, text: str, named: str) -> None:
    config, layout = candidate(family, text)
    problems = verdict(config, layout.config, layout.world_size, num_steps=2, mutation=mutation).problems
    assert any(re.search(named, problem) for problem in problems), problems
