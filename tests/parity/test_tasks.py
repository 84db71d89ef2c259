"""Texts scored in training: the log-likelihoods of `llmtrain eval`, in every engine and layout."""

import random
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any
from zlib import crc32

import pytest
import torch

from llmtrain.config.parameters import declare_parameters
from llmtrain.config.schema import RunConfig
from llmtrain.data.tasks import batches
from llmtrain.data.tasks.batches import Dealing
from llmtrain.data.tasks.metrics import LogLikelihood
from llmtrain.data.tasks.tokens import ScoredText
from llmtrain.infer.evaluation.scoring import log_likelihoods
from llmtrain.infer.model import build_trained
from llmtrain.models.transformer import Transformer
from llmtrain.parallel.layout import plan_layout
from llmtrain.train.setup import engine_class
from llmtrain.train.tasks import text_scores
from llmtrain.values.batch import ModelInputs
from llmtrain.values.fragment import Box
from tests.parity import test_deepspeed, test_megatron
from tests.parity.cases import FINETUNED, MODELS, finetune_run, parity_run
from tests.support.ranks import run_ranks

VOCABULARY, LONGEST = 307, 64

LAYOUTS = {
    **{f"megatron:{name}": ("megatron", *layout) for name, layout in test_megatron.LAYOUTS.items()},
    "megatron:pp2+zb": ("megatron", 2, {"pipeline": 2, "pipeline_schedule": "zero_bubble"}),
    "megatron:dp2+ep2": ("megatron", 2, {"expert": 2}),
    "megatron:pp2+dp2+ep2": ("megatron", 4, {"pipeline": 2, "expert": 2}),
    **{f"deepspeed:{name}": ("deepspeed", *layout) for name, layout in test_deepspeed.LAYOUTS.items()},
    "torch:dp1": ("torch", 1, {}),
    "torch:dp2": ("torch", 2, {}),
}
STAGES = {"megatron": (0, 1), "deepspeed": (0, 1, 2, 3), "torch": (0,)}
DECODERS = ("llama", "gpt", "top_2", "shared")
FINETUNINGS = ("lora", "prompt", "both", "t5", "t5_prompt")
RUNS = [*DECODERS, "t5", "switch_t5", *(f"finetune:{name}" for name in FINETUNINGS)]

PAIRWISE = [
    *(("llama", "torch:dp1", 0), ("gpt", "torch:dp2", 0), ("llama", "megatron:dp2+tp2+sp", 1)),
    *(("gpt", "megatron:tp2+sp+pp2+vp2", 0), ("shared", "megatron:pp2+dp2+ep2", 1), ("t5", "megatron:pp2", 0)),
    *(("llama", "megatron:cp2+tp2+sp+ring", 1), ("t5", "megatron:cp2", 1), ("finetune:lora", "megatron:pp2+zb", 0)),
    *(("finetune:prompt", "megatron:cp2", 0), ("llama", "deepspeed:dp2", 3), ("t5", "deepspeed:tp2+sp", 2)),
    *(("finetune:t5_prompt", "deepspeed:cp2", 1), ("gpt", "deepspeed:cp2+ring", 0)),
]


def works(run: str, parallel: dict[str, Any]) -> bool:
    """True where the run has experts to spread, and layers for all stages."""
    has_experts = run in ("top_2", "shared", "switch_t5")
    return has_experts or "expert" not in parallel


GRID = [
    (run, layout, STAGES[engine][(place + number) % len(STAGES[engine])])
    for place, run in enumerate(RUNS)
    for number, (layout, (engine, _, parallel)) in enumerate(LAYOUTS.items())
    if works(run, parallel)
]
"""Every run in every layout, ZeRO's stages in turn: what a stage shards is gathered alike for all of them."""


class DrawnWeights:
    """Every weight drawn by its name, also those that training begins with as zeros."""

    def __init__(self, config: RunConfig) -> None:
        self._declared = declare_parameters(config.model, config.finetune)

    def read(self, name: str, kind: str, box: Box) -> torch.Tensor:
        shape = self._declared[name].shape
        generator = torch.Generator().manual_seed(crc32(name.encode()))
        whole = torch.randn(shape, generator=generator) * 0.25 + ("norm" in name)
        return whole[box.slices_in(Box.whole(shape))]

    def global_shape(self, name: str, kind: str) -> tuple[int, ...] | None:
        return tuple(self._declared[name].shape) if kind == "master" else None


def run_of(name: str) -> RunConfig:
    prefix, _, finetuning = name.rpartition(":")
    config = finetune_run(finetuning) if prefix else parity_run(name)
    return config.with_keys({"evaluate": {"tasks": ["tasks.yaml"], "tasks_every_steps": 1}})


@lru_cache
def expected(name: str) -> tuple[list[ScoredText], list[LogLikelihood]]:
    """Texts of many lengths, and what `llmtrain eval` finds of them in one process."""
    config = run_of(name)
    model = build_trained(config.model, DrawnWeights(config), torch.device("cpu"), config.finetune)
    texts = texts_for(model, random.Random(5))
    encodes = config.model.family == "encoder_decoder"
    return texts, log_likelihoods(model, [text.behind(model.prompt_tokens, encodes) for text in texts])


def texts_for(model: Transformer, rng: random.Random) -> list[ScoredText]:
    """As the kinds of tasks make them: choices behind a shared prompt, the likeliest answers, whole windows."""
    limit, encodes = LONGEST - model.prompt_tokens, model.config.family == "encoder_decoder"
    texts = list[ScoredText]()

    def ids(count: int) -> tuple[int, ...]:
        return tuple(rng.randrange(VOCABULARY) for _ in range(count))

    for _ in range(5):
        prompt = ids(rng.randrange(1, limit // 2))
        for size in (1, 3, rng.randrange(2, 8)):
            texts.append(
                ScoredText((0, *ids(size)), 1, prompt) if encodes else ScoredText(prompt + ids(size), len(prompt))
            )
    for size in (3, 9):
        prompt, source = (0,) if encodes else ids(size), ids(size) if encodes else ()
        best = likeliest(model, prompt, source)
        texts += [ScoredText((*prompt, token), len(prompt), source) for token in (best, (best + 1) % VOCABULARY)]
    texts.append(ScoredText(ids(limit + (not encodes)), 1, ids(limit) if encodes else ()))
    return texts


def likeliest(model: Transformer, ids: Sequence[int], source: Sequence[int]) -> int:
    """The token that a model finds likeliest behind ids."""
    prompt = [0] * model.prompt_tokens
    tokens = torch.tensor([[*ids] if source else [*prompt, *ids]])
    memory = torch.tensor([[*prompt, *source]]) if source else None
    inputs = ModelInputs(tokens, torch.arange(tokens.shape[1])[None], encoder_tokens_BT=memory)
    return int(model.logits(model(inputs)[0])[0, -1].argmax())


def scored_rank(
    rank: int, world_size: int, config: RunConfig, texts: list[ScoredText], mutation: Callable[[], None] | None
) -> list[LogLikelihood]:
    """What one rank of a layout finds; `mutation` first breaks something in its process."""
    if mutation:
        mutation()
    engine = engine_class(config.engine.name)(config, torch.device("cpu"))
    engine.load_weights(DrawnWeights(config))
    layout = plan_layout(config.parallel, world_size)
    return text_scores(engine, texts, Dealing.of(config, layout, layout.coordinates(rank).data))


def scored(name: str, layout: str, stage: int, mutation: Callable[[], None] | None = None) -> list[list[LogLikelihood]]:
    """What each rank of a layout finds."""
    engine, ranks, parallel = LAYOUTS[layout]
    config = run_of(name).with_keys({"engine": {"name": engine, "zero_stage": stage}, "parallel": parallel})
    return run_ranks(scored_rank, ranks, config, expected(name)[0], mutation, timeout_seconds=120)


def differences(found: list[LogLikelihood], name: str) -> list[str]:
    """Texts of which another sum, or another answer to whether all their tokens are the likeliest, was found."""
    _, wanted = expected(name)
    return [
        f"text {number}: {ours}, not {theirs}"
        for number, (ours, theirs) in enumerate(zip(found, wanted, strict=True))
        if ours.total != pytest.approx(theirs.total, rel=1e-5, abs=1e-5)
        or (ours.num_tokens, ours.greedy) != (theirs.num_tokens, theirs.greedy)
    ]


def whole(*case: Any) -> Any:
    return pytest.param(*case, marks=pytest.mark.whole_grid)


@pytest.mark.parametrize(
    ("name", "layout", "stage"), [*PAIRWISE, *(whole(*case) for case in GRID if case not in PAIRWISE)]
)
def test_texts_have_the_scores_of_one_process(name: str, layout: str, stage: int) -> None:
    ranks = scored(name, layout, stage)
    assert differences(ranks[0], name) == []
    assert all(rank == ranks[0] for rank in ranks)
    assert {score.greedy for score in ranks[0]} == {True, False}


def rows_have_the_numbers_of_their_neighbours() -> None:
    original = batches.step_batches

    def rolled(*arguments: Any) -> Any:
        return [batches.replace(batch, texts_B=batch.texts_B.roll(1)) for batch in original(*arguments)]

    from llmtrain.train import tasks

    tasks.step_batches = rolled


def ranks_have_the_texts_of_the_first() -> None:
    original = Dealing.of
    Dealing.of = staticmethod(lambda config, layout, dp_rank: original(config, layout, 0))  # type: ignore[method-assign]


def the_likeliest_is_that_of_a_part() -> None:
    from llmtrain.parallel.parts import VocabularyPart

    VocabularyPart.likeliest = lambda self, logits_CV: logits_CV.argmax(-1) + self.first  # type: ignore[method-assign]


def positions_are_counted_row_by_row() -> None:
    """They lie position by position: of each, all rows."""
    from llmtrain.models import transformer

    original = transformer.text_sums

    def other(hidden_TH: Any, head: Any, labels_T: Any, objective: Any, batch: Any) -> Any:
        rows = len(batch.texts_B)
        turned = [x.unflatten(0, (-1, rows)).transpose(0, 1).flatten(0, 1) for x in (hidden_TH, labels_T)]
        return original(turned[0], head, turned[1], objective, batch)

    transformer.text_sums = other


def sums_of_ranks_are_not_added_up() -> None:
    from llmtrain.engines import step

    step.dist.all_reduce = lambda *_, **__: None


MUTATIONS = [
    (rows_have_the_numbers_of_their_neighbours, "llama", "torch:dp1"),
    (ranks_have_the_texts_of_the_first, "llama", "torch:dp2"),
    (the_likeliest_is_that_of_a_part, "llama", "megatron:tp2"),
    (positions_are_counted_row_by_row, "llama", "torch:dp1"),
    (sums_of_ranks_are_not_added_up, "llama", "torch:dp2"),
]


@pytest.mark.parametrize(("mutation", "name", "layout"), MUTATIONS, ids=[m.__name__ for m, *_ in MUTATIONS])
def test_broken_code_is_caught(mutation: Callable[[], None], name: str, layout: str) -> None:
    assert differences(scored(name, layout, 0, mutation)[0], name)


def test_every_run_of_the_grid_is_there() -> None:
    assert {name for name in RUNS if ":" not in name} <= MODELS.keys()
    assert {*FINETUNINGS} <= FINETUNED.keys()
