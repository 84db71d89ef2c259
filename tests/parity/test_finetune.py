"""LoRA, adapters and soft prompts in every engine and layout: the numbers of one process."""

from collections.abc import Callable
from dataclasses import replace
from itertools import cycle

import pytest
from torch import Tensor

from llmtrain.checks.parity.compare import LOW_PRECISION
from llmtrain.config import parameters
from llmtrain.config.parameters import FrozenNames, Parameter
from llmtrain.engines import part, stage
from llmtrain.engines.masters import freeze
from llmtrain.finetune.additions import TensorPart
from llmtrain.models.compiled_graphs import dropped
from llmtrain.models.low_rank import Update
from llmtrain.models.transformer import Embeddings
from llmtrain.parallel.stateless_random import Draws
from tests.parity.cases import finetune_run, short_and_whole, verdict
from tests.parity.test_deepspeed import whole as whole_grid
from tests.parity.test_freeze import LAYOUTS, PLACES, laid_out
from tests.parity.test_zero_bubble import more_micro_batches

GRID = [
    (method, *place)
    for method, place in [
        *zip(cycle(("lora", "some", "output", "both", "prompt")), PLACES, strict=False),
        *((method, (layout, stage)) for method in ("experts", "shared", "switch")
          for layout, stage in (("megatron:dp2+ep2", 1), ("deepspeed:dp2+ep2", 2), ("megatron:tp2+sp", 0))),
        *((method, place) for method in ("bert", "bert_both", "t5", "t5_prompt")
          for place in (("megatron:pp2", 0), ("megatron:tp2+sp", 1), ("deepspeed:dp2", 3), ("megatron:cp2", 1))),
    ]
]  # fmt: skip
PAIRWISE = [
    *(("lora", "torch:dp2", 0), ("lora", "megatron:tp2+sp", 1), ("some", "megatron:pp2", 0)),
    *(("output", "megatron:tp2", 1), ("both", "deepspeed:dp2", 3), ("prompt", "megatron:pp2+vp2", 1)),
    *(("some", "deepspeed:tp2+sp", 2), ("prompt", "deepspeed:cp2", 1)),
    *(
        ("experts", "megatron:dp2+ep2", 1),
        ("switch", "deepspeed:dp2+ep2", 1),
        ("shared", "megatron:tp2+sp", 0),
        ("t5", "megatron:pp2", 1),
    ),
    *(("lora", "megatron:cp2", 0), ("t5_prompt", "megatron:tp2+sp", 0)),
]


@pytest.mark.parametrize(("method", "layout", "stage", "num_steps"), short_and_whole(PAIRWISE, GRID))
def test_fp32_equals_one_process(method: str, layout: str, stage: int, num_steps: int) -> None:
    assert layout in LAYOUTS
    config = finetune_run(method)
    assert verdict(config, *laid_out(config, layout, stage), num_steps=num_steps).problems == []


@pytest.mark.parametrize(
    ("method", "layout", "stage_number", "recompute"),
    [
        ("lora", "megatron:tp2+sp", 1, "none"), ("some", "deepspeed:dp2", 3, "full"),
        whole_grid("both", "megatron:pp2", 0, "full"), ("prompt", "torch:dp2", 0, "selective"),
        whole_grid("experts", "megatron:dp2+ep2", 1, "none"),
    ],
)  # fmt: skip
def test_bf16_stays_within_its_bounds(method: str, layout: str, stage_number: int, recompute: str) -> None:
    # What begins as zero is nothing but its updates, and Adam's are the signs of small gradients, which are noise here.
    # With a large eps an update is as its gradient.
    config = finetune_run(method, "bf16").with_keys({"train.recompute": recompute, "optim.eps": 1.0})
    assert verdict(config, *laid_out(config, layout, stage_number), levels=LOW_PRECISION).problems == []


@pytest.mark.parametrize(
    ("method", "recompute"), [("lora", "full"), whole_grid("some", "selective"), ("experts", "full")]
)
def test_what_is_computed_again_is_the_same(method: str, recompute: str) -> None:
    config = finetune_run(method)
    again, ranks = laid_out(config.with_keys({"train.recompute": recompute}), "megatron:tp2+sp", 0)
    assert verdict(config, again, ranks).problems == []


@pytest.mark.parametrize("method", ["lora", *map(whole_grid, ("some", "both", "experts")), "prompt"])
def test_a_zero_bubble_pipeline_has_little_or_nothing_to_leave_for_later(method: str) -> None:
    config = more_micro_batches(finetune_run(method))
    parallel = {"pipeline": 2, "pipeline_schedule": "zero_bubble"}
    changed = config.with_keys({"engine": {"name": "megatron"}, "parallel": parallel})
    assert verdict(config, changed, 2).problems == []


RATES = {
    "finetuned": ("lora", [{"names": ["*lora_b"], "scale": 16.0}, {"names": ["decoder.layers.0.*"], "scale": 0.5}]),
    "experts": ("experts", [{"names": ["*experts.up_lora*"], "scale": 4.0}, {"names": ["*.q.*"], "scale": 2.0}]),
}


@pytest.mark.parametrize(
    ("name", "layout", "stage_number"),
    [
        ("finetuned", "megatron:tp2+sp", 1), ("finetuned", "deepspeed:dp2", 3), ("experts", "megatron:dp2+ep2", 1),
        whole_grid("finetuned", "megatron:pp2", 0), whole_grid("finetuned", "deepspeed:dp2", 1),
        whole_grid("finetuned", "torch:dp2", 0), whole_grid("experts", "deepspeed:dp2+ep2", 2),
    ],
)  # fmt: skip
def test_learning_rates_of_their_own(name: str, layout: str, stage_number: int) -> None:
    method, rates = RATES[name]
    config = finetune_run(method).with_keys({"optim.lr_scale": rates})
    assert verdict(config, *laid_out(config, layout, stage_number)).problems == []
    if layout == "megatron:tp2+sp":
        plain = laid_out(finetune_run(method), layout, stage_number)
        assert verdict(config, *plain).problems, "they are used"


def a_column_update_keeps_its_part() -> None:
    change_declared(lambda each: replace(each, partial=False))


def an_update_begins_with_other_values() -> None:
    change_declared(lambda each: replace(each, draw="zeros") if each.name.endswith("lora_a") else each)


def change_declared(change: Callable[[Parameter], Parameter]) -> None:
    declare = parameters._lora
    parameters._lora = lambda model, finetune: map(change, declare(model, finetune))  # pyright: ignore[reportAttributeAccessIssue]


def a_row_update_is_not_summed() -> None:
    change_part(lambda held: replace(held, leave=None))


def a_rank_drops_the_columns_of_another() -> None:
    change_part(lambda held: replace(held, place=0))


def change_part(change: Callable[[TensorPart], TensorPart]) -> None:
    part.TensorPart = lambda *fields: change(TensorPart(*fields))  # pyright: ignore[reportAttributeAccessIssue]


def updates_draw_as_if_outside_of_blocks() -> None:
    def dropped_here(self: Update, x_SBH: Tensor, draws: Draws | None) -> Tensor:
        inside = draws and replace(draws, sequence=None)
        return dropped(x_SBH, self.dropout, self.site, inside, self.columns)

    Update.dropped = dropped_here


def what_is_added_is_frozen() -> None:
    stage.freeze = lambda found, frozen: freeze(found, FrozenNames((*frozen.patterns, "*lora_b"), frozen.trained))


def the_model_is_trained_too() -> None:
    stage.freeze = lambda found, frozen: freeze(found, FrozenNames(frozen.patterns))


def a_prompt_stands_at_this_ranks_positions() -> None:
    def prompted(self: Embeddings, x_SBH: Tensor, positions_BS: Tensor) -> Tensor:
        return whole(self, x_SBH, positions_BS - positions_BS[:, :1])

    whole = Embeddings._prompted
    Embeddings._prompted = prompted


@pytest.mark.parametrize(
    ("mutation", "method", "layout", "stage_number"),
    [
        (a_column_update_keeps_its_part, "lora", "megatron:tp2", 0),
        whole_grid(a_column_update_keeps_its_part, "experts", "megatron:tp2", 0),
        (an_update_begins_with_other_values, "lora", "megatron:dp2", 0),
        (a_row_update_is_not_summed, "lora", "megatron:tp2", 0),
        (a_rank_drops_the_columns_of_another, "lora", "deepspeed:tp2+sp", 1),
        (updates_draw_as_if_outside_of_blocks, "lora", "megatron:cp2", 0),
        (what_is_added_is_frozen, "lora", "megatron:dp2", 1),
        (the_model_is_trained_too, "lora", "megatron:dp2", 1),
        (a_prompt_stands_at_this_ranks_positions, "prompt", "megatron:cp2", 0),
    ],
)  # fmt: skip
def test_a_rule_that_is_broken_is_caught(
    mutation: Callable[[], None], method: str, layout: str, stage_number: int
) -> None:
    config = finetune_run(method)
    assert verdict(config, *laid_out(config, layout, stage_number), mutation=mutation).problems
