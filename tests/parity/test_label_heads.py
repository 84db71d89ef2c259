"""Heads for labels in every engine and layout: the numbers of one process, those that metrics are made of included."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from llmtrain.checks.parity.compare import LOW_PRECISION
from llmtrain.checks.parity.layouts import STEADY_EPS
from llmtrain.config.schema import RunConfig
from tests.parity import test_deepspeed, test_megatron
from tests.parity.cases import BERT, GPT_UNTIED, GQA_TIED, short_and_whole, verdict
from tests.support.samples import tiny_model, tiny_run

TAGS = ("O", "B-PER", "I-PER", "B-ORG", "I-ORG")
MODELS: dict[str, dict[str, Any]] = {
    "bert": {**BERT, "head": "classifier", "num_labels": 7},
    "bert_tags": {**BERT, "head": "token_classifier", "labels": TAGS},
    "bert_span": {**BERT, "head": "span"},
    "llama": {**GQA_TIED, "head": "classifier", "num_labels": 7, "head_dropout": 0.1},
    "gpt_tags": {**GPT_UNTIED, "head": "token_classifier", "labels": TAGS, "dropout": 0.1},
    "mixtral": {**GQA_TIED, "head": "classifier", "num_labels": 3, "moe": {"num_experts": 4, "ffn_hidden_size": 48}},
}

LAYOUTS = {
    **{f"megatron:{name}": ("megatron", *layout) for name, layout in test_megatron.LAYOUTS.items()},
    "megatron:dp2+ep2": ("megatron", 2, {"expert": 2}),
    **{f"deepspeed:{name}": ("deepspeed", *layout) for name, layout in test_deepspeed.LAYOUTS.items()},
    "torch:dp2": ("torch", 2, {}),
}
STAGES = {"megatron": (0, 1), "deepspeed": (0, 1, 2, 3), "torch": (0,)}

GRID = [
    (model, layout, STAGES[engine][(place + number) % len(STAGES[engine])])
    for place, model in enumerate(MODELS)
    for number, (layout, (engine, _, parallel)) in enumerate(LAYOUTS.items())
    if "expert" not in parallel or model == "mixtral"
]
"""Every head in every layout, ZeRO's stages in turn: those are one code for all models."""
PAIRWISE = [
    *(("bert", "megatron:tp2+sp", 1), ("bert", "megatron:pp2", 1), ("bert", "deepspeed:dp2", 3)),
    *(("bert_tags", "megatron:tp2+sp", 0), ("bert_tags", "megatron:cp2", 1), ("bert_span", "megatron:cp2", 0)),
    *(("bert_span", "deepspeed:tp2+sp", 2), ("llama", "megatron:cp2", 0), ("gpt_tags", "torch:dp2", 0)),
    ("mixtral", "megatron:dp2+ep2", 1),
]


def labelled_run(model: str, precision: str = "fp32", recompute: str = "none") -> RunConfig:
    train = {"global_batch_size": 8, "micro_batch_size": 2, "precision": precision, "recompute": recompute}
    run = tiny_run(tiny_model(**MODELS[model]), train, {"lr": 1e-3, "eps": STEADY_EPS})
    return run.with_keys({"data.objective": "labels"})


def laid_out(config: RunConfig, layout: str, stage: int) -> tuple[RunConfig, int]:
    engine, ranks, parallel = LAYOUTS[layout]
    return config.with_keys({"engine": {"name": engine, "zero_stage": stage}, "parallel": parallel}), ranks


@pytest.mark.parametrize(("model", "layout", "stage", "num_steps"), short_and_whole(PAIRWISE, GRID))
def test_fp32_equals_one_process(model: str, layout: str, stage: int, num_steps: int) -> None:
    config = labelled_run(model)
    assert verdict(config, *laid_out(config, layout, stage), num_steps=num_steps).problems == []


LOW_PRECISION_CASES = [("bert", "megatron:tp2+sp", 1), ("bert_span", "megatron:cp2", 0)]


@pytest.mark.parametrize(("model", "layout", "stage"), LOW_PRECISION_CASES)
def test_bf16_equals_one_process(model: str, layout: str, stage: int) -> None:
    config = labelled_run(model, precision="bf16")
    assert verdict(config, *laid_out(config, layout, stage), levels=LOW_PRECISION).problems == []


def test_a_head_is_on_the_last_stage_of_a_zero_bubble() -> None:
    config = labelled_run("bert", recompute="selective")
    parallel = {"pipeline": 2, "pipeline_schedule": "zero_bubble"}
    layout = config.with_keys({"engine": {"name": "megatron"}, "parallel": parallel})
    assert verdict(config, layout, 2).problems == []


def the_softmax_is_over_a_part_of_the_positions() -> None:
    from llmtrain.models import label_heads

    label_heads.Ends.whole_logits = lambda self, logits_sB2: logits_sB2.detach().float().repeat(2, 1, 1)


def parts_of_the_sequence_are_not_added_up() -> None:
    from llmtrain.parallel.parts import SequenceParts

    SequenceParts.sum_over_block = lambda self, own: own


def every_rank_counts_what_all_have_found() -> None:
    from llmtrain.models.label_loss import LabelHead

    LabelHead._counted_once = lambda self, counts_K: counts_K


def draws_of_the_classified_row_are_those_of_a_part() -> None:
    from llmtrain.models.label_loss import LabelHead

    original = LabelHead._dropped

    def dropped(self: Any, x_SBH: torch.Tensor, draws: Any) -> torch.Tensor:
        own = self.parts.own(32)
        return original(self, x_SBH, draws and draws.with_sequence(own.part(0, own.size)))

    LabelHead._dropped = dropped


MUTATIONS: list[tuple[Callable[[], None], str, str, str]] = [
    (the_softmax_is_over_a_part_of_the_positions, "bert_span", "megatron:cp2", "loss of step 1"),
    (parts_of_the_sequence_are_not_added_up, "bert_tags", "megatron:tp2+sp", "loss of step 1"),
    (every_rank_counts_what_all_have_found, "bert_tags", "megatron:cp2", "counts of the evaluation"),
    (draws_of_the_classified_row_are_those_of_a_part, "llama", "megatron:cp2", "loss of step 1"),
]


@pytest.mark.parametrize(("mutation", "model", "layout", "named"), MUTATIONS, ids=[m.__name__ for m, *_ in MUTATIONS])
def test_broken_code_is_caught(mutation: Callable[[], None], model: str, layout: str, named: str) -> None:
    config = labelled_run(model)
    problems = verdict(config, *laid_out(config, layout, 0), num_steps=2, mutation=mutation).problems
    assert any(named in problem for problem in problems), problems
