"""A checkpoint of any engine and layout continues in any other: bit for bit at the start, on the same data, and with
the losses of the run that was never stopped."""

from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmtrain.config.schema import RunConfig
from tests.parity.cases import GRID_STEPS, SHORT_STEPS
from tests.parity.resharding import (
    SAVED_STEP,
    Mutation,
    Outcome,
    Pair,
    differences,
    draw_family_pairs,
    draw_pairs,
    legal_layouts,
    load_and_continue,
    samples_by_step,
    save_and_continue,
    with_data,
)
from tests.parity.spoiled_loading import (
    SPOILED,
    forget_an_offset,
    forget_moments,
    forget_update_count,
    skip_rounding,
    swap_two_fragments,
)
from tests.support.datasets import VOCAB_SIZE, random_documents, write_dataset
from tests.support.ranks import run_ranks
from tests.support.tokenizers import train_sentencepiece

PAIRS = draw_pairs(60, seed=7034)
FAMILY_PAIRS = draw_family_pairs(45, seed=7017, models=("bert", "switch_t5", "top_2", "t5", "shared"))
FINETUNE_PAIRS = draw_family_pairs(
    18, seed=7015, models=("+lora", "+experts", "+both", "+t5", "+some", "+prompt", "+output")
)
"""What is frozen is in no checkpoint: where it lies is the same in every layout."""
IN_SHORT = 12
SHORT = ((PAIRS, IN_SHORT), (FAMILY_PAIRS, 2), (FINETUNE_PAIRS, 3))
"""So many of the first pairs run in `make test`, for few steps: from every engine to every engine."""

LOSS_FP32 = 1e-5
LOSS_LOW_PRECISION = 1e-2
"""Layouts and precisions round activations in different places: one rounding of bf16 is up to 0.4%. Masters and moments
are compared bit for bit before that."""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dataset")
    text = ["the words of a text that has as many pieces as the documents have tokens and then as many words again"]
    tokenizer = train_sentencepiece(text, "bpe", VOCAB_SIZE)
    write_dataset(folder, [random_documents(60, seed) for seed in range(3)], tokenizer=tokenizer)
    return folder


def run_pair(
    pair: Pair, dataset: Path, folder: Path, more_steps: int = 0, mutation: Mutation | None = None
) -> list[list[Outcome]]:
    source, target = (with_data(config, dataset) for config in (pair.source, pair.target))
    saved = run_ranks(save_and_continue, source.launch.num_workers, source, folder, more_steps, timeout_seconds=120)
    loaded = run_ranks(
        load_and_continue,
        target.launch.num_workers,
        target,
        folder / "checkpoints" / f"step-{SAVED_STEP:08d}",
        more_steps,
        mutation,
        timeout_seconds=120,
    )
    return [saved, loaded]


def cases() -> list[Any]:
    short = [(number, pair) for pairs, count in SHORT for number, pair in enumerate(pairs[:count])]
    grid = [(number, pair) for pairs, _ in SHORT for number, pair in enumerate(pairs)]
    return [pytest.param(pair, SHORT_STEPS, id=f"{number}-{pair.name}") for number, pair in short] + [
        pytest.param(pair, GRID_STEPS, id=f"{number}-{pair.name}-{GRID_STEPS}", marks=pytest.mark.whole_grid)
        for number, pair in grid
    ]


@pytest.mark.parametrize(("pair", "more_steps"), cases())
def test_a_checkpoint_continues_in_another_layout(pair: Pair, more_steps: int, dataset: Path, tmp_path: Path) -> None:
    saved, loaded = run_pair(pair, dataset, tmp_path, more_steps)
    assert differences(saved, loaded, pair) == []
    first = SAVED_STEP * pair.source.train.global_batch_size
    assert samples_by_step(saved, pair.source) == samples_by_step(loaded, pair.target)
    assert list(chain(*samples_by_step(loaded, pair.target))) == list(range(first, first + 8 * more_steps, 2))
    before, after = ([result.loss for result in outcomes[0].results] for outcomes in (saved, loaded))
    allowed = LOSS_FP32 if pair.source.train.precision == pair.target.train.precision == "fp32" else LOSS_LOW_PRECISION
    np.testing.assert_allclose(after, before, rtol=allowed)


def kinds(pair: Pair) -> set[str]:
    """What is special about a pair."""
    found = set()
    for config in (pair.source, pair.target):
        parallel, engine = config.parallel, config.engine
        marks = {
            "uneven stages, tied embeddings": parallel.pipeline_split and config.model.tie_embeddings,
            "interleaved stages": parallel.virtual_pipeline > 1,
            "zero bubble": parallel.pipeline_schedule == "zero_bubble",
            "sequence parallel": parallel.sequence,
            "context parallel": parallel.context > 1,
            "ring": parallel.context > 1 and config.context_exchange == "ring",
            "offload": engine.offload == "cpu",
            f"{engine.name} ZeRO {engine.zero_stage}": True,
            "grouped queries": config.model.kv_heads < config.model.num_heads,
            "untied embeddings": not config.model.tie_embeddings,
        }
        found |= {mark for mark, there in marks.items() if there}
    before, after = (config.launch.num_workers // config.parallel.replica_size for config in (pair.source, pair.target))
    found.add("data parallel grows" if after > before else "data parallel shrinks" if after < before else "")
    return found | {f"{pair.source.train.precision} to {pair.target.train.precision}"}


def test_the_short_selection_leaves_nothing_out() -> None:
    engines = {(pair.source.engine.name, pair.target.engine.name) for pair in PAIRS[:IN_SHORT]}
    assert len(engines) == 9
    wanted = {
        "uneven stages, tied embeddings", "interleaved stages", "sequence parallel", "context parallel", "offload",
        "megatron ZeRO 1", "deepspeed ZeRO 3", "grouped queries", "untied embeddings", "data parallel grows",
        "data parallel shrinks", "fp32 to bf16", "bf16 to fp32", "ring", "zero bubble",
    }  # fmt: skip
    assert wanted <= set.union(*map(kinds, PAIRS[:IN_SHORT]))


LION_PAIRS = [pair for pair in PAIRS if pair.source.train.precision == pair.target.train.precision == "fp32"][:12]


def with_optimizer(pair: Pair, name: str) -> Pair:
    source, target = (config.with_keys({"optim.name": name, "optim.lr": 3e-4}) for config in (pair.source, pair.target))
    return Pair(pair.model, source, target)


@pytest.mark.parametrize(
    "pair",
    [pytest.param(p, id=p.name, marks=pytest.mark.whole_grid if n > 3 else ()) for n, p in enumerate(LION_PAIRS)],
)
def test_a_checkpoint_of_lion_continues_in_another_layout(pair: Pair, dataset: Path, tmp_path: Path) -> None:
    pair = with_optimizer(pair, "lion")
    saved, loaded = run_pair(pair, dataset, tmp_path, SHORT_STEPS)
    assert differences(saved, loaded, pair) == []
    assert saved[0].held["exp_avg_sq"] == [] and any(outcome.held["exp_avg"] for outcome in saved)
    before, after = ([result.loss for result in outcomes[0].results] for outcomes in (saved, loaded))
    np.testing.assert_allclose(after, before, rtol=LOSS_FP32)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("zero_bubble", "zero_bubble"),
        *(pytest.param(*pair, marks=pytest.mark.whole_grid) for pair in (("zero_bubble", None), (None, "zero_bubble"))),
    ],
)
def test_a_zero_bubble_run_continues_bit_for_bit(
    before: str | None, after: str | None, dataset: Path, tmp_path: Path
) -> None:
    """In the schedule that it had, and in the other, which adds the same numbers in the same order."""
    stages = layout("megatron", ranks=2, pipeline=2)
    source, target = (stages.with_keys({"parallel.pipeline_schedule": schedule}) for schedule in (before, after))
    pair = Pair("llama", source, target)
    saved, loaded = run_pair(pair, dataset, tmp_path, SHORT_STEPS)
    assert differences(saved, loaded, pair) == []
    assert [outcome.results for outcome in saved] == [outcome.results for outcome in loaded]


def test_a_moment_left_out_is_named(dataset: Path, tmp_path: Path) -> None:
    pair = with_optimizer(Pair("llama", layout("torch"), layout("megatron", ranks=2, tensor=2, zero_stage=1)), "lion")
    problems = differences(*run_pair(pair, dataset, tmp_path, mutation=forget_moments), pair)
    assert any("exp_avg of " in problem and "differs" in problem for problem in problems), problems


def layout(engine: str, **wanted: int) -> RunConfig:
    """The legal fp32 layout of the Llama with these sizes and nothing else."""
    (found,) = (
        config
        for config in legal_layouts("llama", engine, "fp32")
        if config.launch.num_workers == wanted.get("ranks", 1)
        and config.parallel.tensor == wanted.get("tensor", 1)
        and config.parallel.pipeline == wanted.get("pipeline", 1)
        and config.engine.zero_stage == wanted.get("zero_stage", 0)
        and config.parallel.context == config.parallel.virtual_pipeline == 1
        and config.parallel.pipeline_schedule is None
        and not (config.parallel.sequence or config.parallel.pipeline_split or config.engine.offload != "none")
    )
    return found


@pytest.mark.parametrize(
    ("mutation", "precision", "named"),
    [
        (swap_two_fragments, "fp32", f"exp_avg of {SPOILED} differs in "),
        (forget_an_offset, "fp32", f"master of {SPOILED} differs in "),
        (forget_update_count, "fp32", "updates = 0, saved 3"),
        (skip_rounding, "bf16", "are not the masters, rounded"),
    ],
)
def test_what_is_not_loaded_rightly_is_named(
    mutation: Mutation, precision: str, named: str, dataset: Path, tmp_path: Path
) -> None:
    target = layout("megatron", ranks=2, tensor=2, zero_stage=1)
    target = target.with_keys({"train.precision": precision})
    source = layout("megatron", ranks=2, tensor=2) if mutation is swap_two_fragments else layout("torch")
    pair = Pair("llama", source, target)
    problems = differences(*run_pair(pair, dataset, tmp_path, mutation=mutation), pair)
    assert any(named in problem for problem in problems), problems
    if mutation is swap_two_fragments:
        assert len(problems) == 1
