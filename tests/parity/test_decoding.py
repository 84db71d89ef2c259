"""A model over tensor ranks, pipeline stages and both: the tokens, scores, vectors and fillings of one process."""

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from llmtrain.config.finetune import FinetuneConfig
from llmtrain.data.tasks.tokens import ScoredText
from llmtrain.engines.decoding import decoding_groups, load_part
from llmtrain.infer.batching.scheduler import Limits
from llmtrain.infer.model import FoundModel, TrainedModel
from llmtrain.infer.sharded.ranks import LeadingRank, RankLinks, follow, open_word_group
from llmtrain.infer.sharded.works import Embedding, MaskFilling, TextScoring
from llmtrain.models.attention.rows import BLOCK
from llmtrain.models.init import InitialWeights
from llmtrain.models.transformer import Transformer
from llmtrain.parallel.layout import Layout
from llmtrain.values.fragment import Box
from tests.support.ranks import run_ranks
from tests.support.samples import tiny_model
from tests.unit.infer.batching.test_batch import CASES, requests, run

LAYOUTS = {"tp2": Layout(tensor=2), "pp2": Layout(pipeline=2), "tp2 pp2": Layout(tensor=2, pipeline=2)}
MORE: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied": {"tie_embeddings": True},
    "padding on the last rank alone": {"vocab_size": 50},
    "low rank": {},
    "prompt": {},
}
ENCODERS: dict[str, dict[str, Any]] = {
    "masks": {"family": "encoder", "head": "mlm", "position": "learned"},
    "masks of a tied head": {"family": "encoder", "head": "mlm", "tie_embeddings": True, "vocab_size": 50},
}
SHORT = [
    ("low rank", "tp2"), ("relative", "pp2"), ("extras by position", "tp2"), ("linear", "pp2"), ("tied", "pp2"),
    ("padding on the last rank alone", "tp2"), ("shared expert", "tp2"), ("t5", "tp2 pp2"), ("t5 with experts", "pp2"),
    ("masks", "tp2 pp2"), ("prompt", "pp2"),
]  # fmt: skip
LORA = FinetuneConfig.model_validate({"method": "lora", "base": "none", "lora": {"rank": 4, "targets": ["attention"]}})
PROMPT = FinetuneConfig.model_validate({"method": "prompt", "base": "none", "prompt": {"tokens": 2}})
GRID = [(case, layout) for case in (*CASES, *MORE, *ENCODERS) for layout in LAYOUTS]


def found_model(case: str) -> FoundModel:
    changes: dict[str, Any] = (CASES | MORE | ENCODERS)[case]
    config = tiny_model(init={"std": 0.3}, max_seq_len=5 * BLOCK, **changes)
    finetune = {"low rank": LORA, "prompt": PROMPT}.get(case)
    return FoundModel(config, NotZero(config, 1, finetune), finetune)


class NotZero(InitialWeights):
    """Initial weights, but for the zeros of low-rank updates and biases; a bias is not the same everywhere."""

    def read(self, name: str, kind: str, box: Box) -> Tensor:
        part = super().read(name, kind, box)
        if not name.endswith(("lora_b", "bias", "sinks")):
            return part
        places = torch.arange(box.offsets[-1], box.offsets[-1] + box.shape[-1])
        return part + 0.03 * (places % 7)


def limits_of(found: FoundModel) -> Limits:
    return replace(Limits.of(found.config, 4), chunk=BLOCK, blocks=13)


def asked(found: FoundModel) -> list[Any]:
    wanted = requests(random.Random(3), found.config.family == "encoder_decoder", count=6)
    size = found.config.vocabulary
    return [
        replace(each, **{key: tuple(token % size for token in getattr(each, key)) for key in ("prompt", "source")})
        for each in wanted
    ]


def found_out(trained: TrainedModel, limits: Limits, wanted: list[Any]) -> dict[str, Any]:
    """Tokens and scores of a batch, and before and behind it how likely texts are, and the vector of one."""
    begun = works(trained, wanted)
    runner = trained.model if trained.ranks is None else trained.ranks.runner(limits)
    tokens, logits = run(runner, limits, wanted, random.Random(4))
    assert len(tokens) > 4
    scores = {f"scores of {place}": row for place, row in logits.items()}
    return {
        **begun,
        **scores,
        "tokens": tokens,
        **{f"{name} later": each for name, each in works(trained, wanted).items()},
    }


def works(trained: TrainedModel, wanted: list[Any]) -> dict[str, Any]:
    longest = trained.model.config.max_seq_len - 2
    texts = [
        ScoredText((*each.prompt, 1, 2, 3)[-longest:], 1, each.source[-longest:]).behind(2, bool(each.source))
        for each in wanted
    ]
    scored = trained.do(TextScoring(texts))
    return {
        "likelihoods": torch.tensor([each.total for each in scored]),
        "likeliest": [each.greedy for each in scored],
        "vector": trained.do(Embedding(wanted[0].source or wanted[0].prompt, 1)),
    }


def fill(trained: TrainedModel) -> dict[str, Any]:
    ids = [5, 4, 6, 7, 4, 9]
    fillings = trained.do(MaskFilling(ids, 4, 6))
    return {
        "places": [each.position for each in fillings],
        "tokens": [token for each in fillings for token, _ in each.tokens],
        "shares": torch.tensor([share for each in fillings for _, share in each.tokens]),
        "vector": trained.do(Embedding(ids)),
    }


def with_code(rank: int, world_size: int, mutation: Callable[[], None], *rest: Any) -> Any:
    mutation()
    return on_ranks(rank, world_size, *rest)


def on_ranks(rank: int, world_size: int, found: FoundModel, layout: Layout, ask: Any, *asked: Any) -> Any:
    """What `ask` finds with a model whose parts lie on these ranks."""
    groups = decoding_groups(layout)
    words = open_word_group()
    part = load_part(found, groups, None, torch.device("cpu"))
    if rank:
        follow(part, RankLinks(groups), words)
        return None
    leader = LeadingRank(part, RankLinks(groups), words)
    result = ask(found.trained(part, leader), *asked)
    leader.end()
    return result


def unbroken() -> None:
    pass


def require_equal(case: str, layout: str, mutation: Callable[[], None] = unbroken) -> None:
    found, ranks = found_model(case), LAYOUTS[layout]
    ask: Callable[..., dict[str, Any]] = fill if case in ENCODERS else found_out
    what = () if case in ENCODERS else (limits_of(found), asked(found))
    expected = ask(found.read(torch.device("cpu")), *what)
    result = run_ranks(with_code, ranks.world_size, mutation, found, ranks, ask, *what)[0]
    assert result.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, Tensor):
            torch.testing.assert_close(result[name], value, rtol=1e-5, atol=5e-5)
        else:
            assert result[name] == value, name


@pytest.mark.parametrize(
    ("case", "layout"),
    [
        pytest.param(case, layout, marks=() if (case, layout) in SHORT else pytest.mark.whole_grid)
        for case, layout in GRID
    ],
)
def test_ranks_find_what_one_process_finds(case: str, layout: str) -> None:
    require_equal(case, layout)


def crowd_and_alone(trained: TrainedModel, limits: Limits, wanted: list[Any]) -> Any:
    assert trained.ranks is not None
    one = replace(limits, slots=1, shares_prompts=False)
    alone = run(trained.ranks.runner(one), one, wanted)
    return alone, run(trained.ranks.runner(limits), limits, wanted, random.Random(4))


@pytest.mark.parametrize(
    ("case", "layout"),
    [
        pytest.param(case, layout, marks=() if (case, layout) == ("plain", "tp2 pp2") else pytest.mark.whole_grid)
        for case in ("plain", "shared expert", "t5", "linear")
        for layout in LAYOUTS
    ],
)
def test_exact_scores_are_those_of_a_text_alone(case: str, layout: str) -> None:
    found, ranks = found_model(case), LAYOUTS[layout]
    exact = replace(limits_of(found), exact=True)
    what = (crowd_and_alone, exact, asked(found))
    (alone, expected), (tokens, logits) = run_ranks(on_ranks, ranks.world_size, found, ranks, *what)[0]
    assert len(tokens) > 4
    for number, written in tokens.items():
        assert written == alone[number]
    for place, score in logits.items():
        if place[0] in tokens:
            assert torch.equal(score, expected[place]), place


def the_bias_of_the_head_is_left_out() -> None:
    whole = RankLinks.logits

    def logits(self: RankLinks, model: Transformer, hidden_SBH: Tensor) -> Tensor:
        mlm, model.mlm = model.mlm, None
        found = whole(self, model, hidden_SBH)
        model.mlm = mlm
        return found

    RankLinks.logits = logits


def parts_of_the_head_are_swapped() -> None:
    whole = dist.all_gather_into_tensor

    def swapped(output: Tensor, own: Tensor, **more: Any) -> None:
        whole(output, own, **more)
        output.copy_(torch.cat(output.chunk(2)[::-1]))

    dist.all_gather_into_tensor = swapped


def a_stage_begins_with_the_wrong_order() -> None:
    whole = RankLinks.received
    RankLinks.received = lambda self, shape, device: whole(self, shape, device).flip(0)


@pytest.mark.parametrize(
    ("mutation", "case", "layout"),
    [
        (parts_of_the_head_are_swapped, "plain", "tp2"),
        (a_stage_begins_with_the_wrong_order, "plain", "pp2"),
        (the_bias_of_the_head_is_left_out, "masks", "tp2"),
    ],
)
def test_broken_code_is_caught(mutation: Callable[[], None], case: str, layout: str) -> None:
    with pytest.raises(AssertionError):
        require_equal(case, layout, mutation)
