"""Distillation in every engine and layout: the numbers of one process, and in one process those of the formula."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import cycle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llmtrain.checks.parity.batches import probe_batches
from llmtrain.checks.parity.compare import LOW_PRECISION
from llmtrain.config.schema import RunConfig
from llmtrain.engines import teacher
from llmtrain.engines.teacher import Teacher
from llmtrain.engines.torch_engine import TorchEngine
from llmtrain.values.batch import IGNORED_LABEL, Batch
from llmtrain.values.fragment import Fragment
from tests.parity.cases import MODELS, finetune_run, parity_run, short_and_whole, verdict
from tests.parity.test_freeze import LAYOUTS, PLACES, laid_out
from tests.support.samples import tiny_model

TOP_K, TEMPERATURE, WEIGHT = 12, 2.0, 0.7

TEACHERS: dict[str, dict[str, Any]] = {
    "llama": {"num_layers": 3, "hidden_size": 48, "num_kv_heads": 4, "tie_embeddings": False},
    "gpt": {**MODELS["llama"], "hidden_size": 64},
    "dropout": MODELS["top_2"],
    "bert": {**MODELS["bert"], "hidden_size": 48},
    "t5": {**MODELS["t5"], "hidden_size": 48, "num_layers": 3},
    "top_2": MODELS["gpt"],
    "lora": MODELS["dropout"],
}
"""Of each student: a wider one, of another kind, with experts, with dropout (which a teacher has not)."""

GRID = [(model, *place) for model, place in zip(cycle(("llama", "gpt", "dropout")), PLACES, strict=False)]
GRID += [("bert", "megatron:tp2", 0)]
PAIRWISE = [
    *(("llama", "torch:dp2", 0), ("gpt", "megatron:pp2+vp2", 1), ("llama", "deepspeed:tp2+sp", 1)),
    *(("t5", "megatron:pp2", 1), ("top_2", "megatron:dp2+ep2", 1), ("lora", "deepspeed:dp2", 2)),
]
"""Each engine, and the kinds of model and of parallelism that a teacher is aware of."""


def distill_run(model: str, precision: str = "fp32", **keys: Any) -> RunConfig:
    run = finetune_run(model, precision) if model == "lora" else parity_run(model, precision)
    section = {"teacher": "none", "top_k": TOP_K, "temperature": TEMPERATURE, "weight": WEIGHT, **keys}
    return run.with_keys({"distill": {**section, "model": tiny_model(**TEACHERS[model])}})


@pytest.mark.parametrize(("model", "layout", "stage", "num_steps"), short_and_whole(PAIRWISE, GRID))
def test_fp32_equals_one_process(model: str, layout: str, stage: int, num_steps: int) -> None:
    assert layout in LAYOUTS
    config = distill_run(model)
    assert verdict(config, *laid_out(config, layout, stage), num_steps=num_steps).problems == []


def test_bf16_stays_within_its_bounds() -> None:
    config = distill_run("llama", "bf16").with_keys({"optim.eps": 1.0})
    assert verdict(config, *laid_out(config, "megatron:tp2+sp", 1), levels=LOW_PRECISION).problems == []


def losses_by_hand(engine: TorchEngine, batches: Iterable[Batch]) -> tuple[Tensor, Tensor]:
    """([], []): cross-entropy, and KL at the temperature with the less likely tokens as one class, per target."""
    assert engine.teacher is not None
    plain, taught, number = torch.zeros(()), torch.zeros(()), 0
    for batch in batches:
        valid = batch.labels_BS != IGNORED_LABEL
        own = engine.model.logits(engine.model(batch)[0])[valid]
        other = engine.teacher.model.logits(engine.teacher.model(batch)[0])[valid]
        plain = plain + F.cross_entropy(own, batch.labels_BS[valid], reduction="sum")
        q, p = (torch.softmax(each / TEMPERATURE, -1) for each in (other, own))
        places = q.argsort(-1, descending=True)[:, :TOP_K]
        q, p = (torch.cat((at := each.gather(1, places), 1 - at.sum(-1, True)), 1) for each in (q, p))
        taught = taught + (q * (q / p).log()).sum()
        number += int(valid.sum())
    return plain / number, taught / number


def test_loss_and_gradient_are_those_of_the_formula() -> None:
    config = distill_run("llama").with_keys({"optim.grad_clip": 0.0})
    engine, batches = TorchEngine(config, torch.device("cpu")), probe_batches(config, 1, 0, 1)
    plain, taught = losses_by_hand(engine, batches)
    mixed = (1 - WEIGHT) * plain + WEIGHT * TEMPERATURE**2 * taught
    gradients = torch.autograd.grad(mixed, list(engine.parameters.values()))
    expected = dict(zip(engine.parameters, gradients, strict=True))
    found: dict[str, Tensor] = {}

    def keep(fragments: Iterable[Fragment]) -> None:
        found.update({fragment.name: fragment.tensor.clone() for fragment in fragments})

    engine.inspect_gradients = keep
    before = engine.eval_step(batches)
    result = engine.train_step(1, batches, 1e-3)
    assert result.loss == pytest.approx(plain.item(), rel=1e-5)
    assert result.metrics["distill_loss"] == pytest.approx(taught.item(), rel=1e-4)
    assert before.loss_sum / before.num_tokens == pytest.approx(plain.item(), rel=1e-5)
    assert before.counts[0] / before.num_tokens == pytest.approx(taught.item(), rel=1e-4)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-6, msg=name)


def test_a_teacher_is_not_trained_and_does_not_drop() -> None:
    config = distill_run("lora")
    engine = TorchEngine(config, torch.device("cpu"))
    assert engine.teacher is not None
    before = [weight.clone() for weight in engine.teacher.model.parameters()]
    batches = probe_batches(config, 1, 0, 1)
    first, again = (engine.teacher.teach(batches)[0].soft for _ in range(2))
    assert first is not None and again is not None and torch.equal(first.log_probs_TK, again.log_probs_TK)
    engine.train_step(1, batches, 1e-3)
    assert all(map(torch.equal, before, engine.teacher.model.parameters()))
    assert not any("teacher" in fragment.name for fragment in engine.fragments())


def the_teacher_has_no_temperature() -> None:
    likeliest = teacher.likeliest
    teacher.likeliest = lambda logits, part, top_k: likeliest(logits * TEMPERATURE, part, top_k)


def each_rank_has_likeliest_tokens_of_its_own() -> None:
    likeliest = teacher.likeliest
    teacher.likeliest = lambda logits, part, top_k: likeliest(logits, replace(part, group=None), top_k)


def the_stage_before_is_not_heard() -> None:
    receive = Teacher._receive
    Teacher._receive = lambda self, batch: receive(self, batch).zero_()


def every_rank_has_a_teacher_of_its_own() -> None:
    """As if each had been drawn where it is, and not by global names and indices."""
    load = Teacher.load

    def spoiled(self: Teacher, source: Any) -> None:
        load(self, source)
        assert self.pipeline is not None
        next(iter(self.model.stacks[0].layers.values())).mlp.up.weight.data.mul_(1 + self.pipeline.rank())

    Teacher.load = spoiled


@pytest.mark.parametrize(
    ("mutation", "layout"),
    [
        (the_teacher_has_no_temperature, "torch:dp2"),
        (each_rank_has_likeliest_tokens_of_its_own, "megatron:tp2"),
        (the_stage_before_is_not_heard, "megatron:pp2"),
        pytest.param(every_rank_has_a_teacher_of_its_own, "megatron:pp2", marks=pytest.mark.whole_grid),
    ],
)
def test_a_rule_that_is_broken_is_caught(mutation: Callable[[], None], layout: str) -> None:
    config = distill_run("llama")
    assert verdict(config, *laid_out(config, layout, 0), mutation=mutation).problems
