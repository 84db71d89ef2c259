"""Decoding over tensor ranks, pipeline stages and both: the tokens and scores of one process."""

import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from llmtrain.config.finetune import FinetuneConfig
from llmtrain.engines.decoding import decoding_groups, load_part
from llmtrain.infer.batching.scheduler import Limits
from llmtrain.infer.model import FoundModel, build_trained
from llmtrain.infer.sharded.ranks import LeadingArena, RankLinks, follow, open_word_group, tell_end
from llmtrain.models.attention.rows import BLOCK
from llmtrain.models.init import InitialWeights
from llmtrain.parallel.layout import Layout
from tests.support.ranks import run_ranks
from tests.support.samples import tiny_model
from tests.unit.infer.batching.test_batch import CASES, requests, run

LAYOUTS = {"tp2": Layout(tensor=2), "pp2": Layout(pipeline=2), "tp2 pp2": Layout(tensor=2, pipeline=2)}
MORE: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied": {"tie_embeddings": True},
    "padding on the last rank alone": {"vocab_size": 50},
    "low rank": {},
}
SHORT = [
    ("low rank", "tp2"), ("relative", "pp2"), ("extras by position", "tp2"), ("linear", "pp2"), ("tied", "pp2"),
    ("padding on the last rank alone", "tp2"), ("shared expert", "tp2"), ("t5", "tp2 pp2"), ("t5 with experts", "pp2"),
]  # fmt: skip
LORA = FinetuneConfig.model_validate({"method": "lora", "base": "none", "lora": {"rank": 4, "targets": ["attention"]}})
GRID = [(case, layout) for case in (*CASES, *MORE) for layout in LAYOUTS]


def found_model(case: str) -> FoundModel:
    changes: dict[str, Any] = (CASES | MORE)[case]
    config = tiny_model(init={"std": 0.3}, max_seq_len=5 * BLOCK, **changes)
    finetune = LORA if case == "low rank" else None
    return FoundModel(config, NotZero(config, 1, finetune), finetune)


class NotZero(InitialWeights):
    """Initial weights, but for the zeros of low-rank updates and biases."""

    def read(self, name: str, kind: str, box: Any) -> torch.Tensor:
        part = super().read(name, kind, box)
        return part + 0.1 if name.endswith(("lora_b", "bias", "sinks")) else part


def limits_of(found: FoundModel) -> Limits:
    return replace(Limits.of(found.config, 4), chunk=BLOCK, blocks=13)


def asked(found: FoundModel) -> list[Any]:
    wanted = requests(random.Random(3), found.config.family == "encoder_decoder", count=6)
    size = found.config.vocabulary
    return [
        replace(each, **{key: tuple(token % size for token in getattr(each, key)) for key in ("prompt", "source")})
        for each in wanted
    ]


def decode_on_ranks(rank: int, world_size: int, case: str, layout: Layout) -> Any:
    found = found_model(case)
    groups = decoding_groups(layout)
    part = load_part(found, groups, None, torch.device("cpu"))
    links, words = RankLinks(groups), open_word_group()
    if rank:
        follow(part, links, words)
        return None
    arena = LeadingArena(part, limits_of(found), links, words)
    result = run(arena, limits_of(found), asked(found), random.Random(4))
    tell_end(words)
    return result


@pytest.mark.parametrize(
    ("case", "layout"),
    [
        pytest.param(case, layout, marks=() if (case, layout) in SHORT else pytest.mark.whole_grid)
        for case, layout in GRID
    ],
)
def test_ranks_write_what_one_process_writes(case: str, layout: str) -> None:
    found, ranks = found_model(case), LAYOUTS[layout]
    whole = build_trained(found.config, found.weights, torch.device("cpu"), found.finetune)
    expected, scores = run(whole, limits_of(found), asked(found), random.Random(4))
    tokens, logits = run_ranks(decode_on_ranks, ranks.world_size, case, ranks)[0]
    assert tokens == expected and len(tokens) > 4
    assert logits.keys() == scores.keys()
    for place, score in scores.items():
        torch.testing.assert_close(logits[place], score, rtol=1e-5, atol=5e-5)
