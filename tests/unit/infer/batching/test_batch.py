"""Many texts at a time are those of one at a time, in every family and kind of attention; `exact`, to the last bit."""

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from llmtrain.infer.batching.arena import StepRunner
from llmtrain.infer.batching.batch import ContinuousBatch
from llmtrain.infer.batching.request import NewToken, Request
from llmtrain.infer.batching.sampling import Sampling
from llmtrain.infer.batching.scheduler import BatchStep, Limits
from llmtrain.infer.model import logits_of
from llmtrain.interop.examples import Example
from llmtrain.models.attention.rows import BLOCK
from llmtrain.models.transformer import Transformer, build_model
from tests.support.samples import tiny_model
from tests.support.weights import materialize
from tests.unit.models.attention.dense_attention import KINDS

LONGEST = 5 * BLOCK
ENCODES = {"family": "encoder_decoder", "num_encoder_layers": 2}
CASES: dict[str, dict[str, Any]] = {
    "learned": {"position": "learned"},
    "sinusoidal": {"position": "sinusoidal"},
    "alibi": {"position": "alibi"},
    "relative": {"position": "t5_relative"},
    **{kind: {"attention": attention} for kind, attention in KINDS.items()},
    "extras": {"attention": {"kind": "sliding_window", "window": 20, "sinks": True, "softcap": 3.0}},
    "extras by position": {"attention": {"sinks": True, "softcap": 3.0}, "position": "alibi", "qk_norm": True},
    "post norm": {"norm_position": "post"},
    "switch": {"moe": {"num_experts": 4, "router": "switch"}},
    "top 2": {"moe": {"num_experts": 4, "top_k": 2}},
    "shared expert": {"moe": {"num_experts": 4, "top_k": 2, "num_shared_experts": 1}},
    "experts choose": {"moe": {"num_experts": 4, "router": "expert_choice"}},
    "t5": {**ENCODES, "position": "t5_relative"},
    "t5 with linear attention": {**ENCODES, "position": "rope", "attention": KINDS["linear"]},
    "t5 with experts": {**ENCODES, "position": "rope", "moe": {"num_experts": 4, "router": "switch"}},
}
SHORT = ["learned", "full", "linear", "extras by position", "top 2", "t5"]


def built(**changes: Any) -> Transformer:
    model = build_model(tiny_model(init={"std": 0.3}, max_seq_len=LONGEST, **changes))
    materialize(model, seed=1, device=torch.device("cpu"))
    return model.eval()


def requests(rng: random.Random, encodes: bool, count: int = 10) -> list[Request]:
    """Some begin alike; greedy ones and drawn ones."""
    shared, found = [rng.randrange(300) for _ in range(80)], list[Request]()
    for number in range(count):
        start = shared[: rng.choice([0, 40, 80])]
        ids = (*start, *(rng.randrange(300) for _ in range(rng.randrange(1, 20))))
        sampling = Sampling(0) if number % 2 else Sampling(0.8, top_p=0.95, seed=number)
        prompt, source = ((0,), ids) if encodes else (ids, ())
        found.append(Request(prompt, rng.randrange(1, 50), sampling, source=source, text=number % 3))
    return found


class Recorded(ContinuousBatch):
    """Keeps the scores of each request's positions."""

    def __init__(self, model: Transformer | StepRunner, limits: Limits) -> None:
        super().__init__(model, limits)
        self.logits = dict[tuple[int, int], Tensor]()
        run = self.arena.run

        def recorded(step: BatchStep) -> Tensor:
            found = run(step)
            self.logits |= {(part.request, part.end): row for part, row in zip(step.chosen, found, strict=True)}
            return found

        self.arena.run = recorded  # type: ignore[method-assign]  # looks at what passes


def run(model: Transformer | StepRunner, limits: Limits, asked: list[Request], crowd: random.Random | None = None):
    """(tokens by request, logits by request and position); with a crowd, requests come and some go at random times."""
    batch, tokens, gone = Recorded(model, limits), dict[int, list[int]](), set[int]()
    waiting = list(asked)
    while waiting or not batch.is_idle:
        if waiting and (crowd is None or crowd.random() < 0.5):
            tokens[batch.add(waiting.pop(0))] = []
        if crowd is not None and tokens and crowd.random() < 0.01:
            gone.add(number := crowd.choice(sorted(tokens)))
            batch.cancel(number)
        for new in batch.step():
            tokens[new.request].append(new.token)
    assert batch.scheduler.pool.available == limits.blocks
    return {number: each for number, each in tokens.items() if number not in gone}, batch.logits


@pytest.mark.parametrize("exact", [False, True], ids=["fast", "exact"])
@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if case in SHORT else pytest.mark.whole_grid) for case in CASES]
)
def test_a_crowd_changes_nothing(case: str, exact: bool) -> None:
    model = built(**CASES[case])
    one, crowded = (replace(Limits.of(model.config, slots, exact=exact), chunk=2 * BLOCK) for slots in (1, 5))
    one, crowded = replace(one, shares_prompts=False), replace(crowded, blocks=13)
    for seed in (0, 1):
        asked = requests(random.Random(seed), model.has_memory, count=8)
        alone, expected = run(model, one, asked)
        together, actual = run(model, crowded, asked, random.Random(seed))
        assert len(together) > 5
        for number, tokens in together.items():
            assert tokens == alone[number]
        for place, logits in actual.items():
            if place[0] not in together:
                continue
            if exact:
                assert torch.equal(logits, expected[place]), place
            else:
                torch.testing.assert_close(logits, expected[place], rtol=1e-5, atol=5e-5)


@pytest.mark.parametrize("case", [case for case in CASES if case != "experts choose"])
def test_what_is_remembered_gives_the_scores_of_the_whole_sequence(case: str) -> None:
    """Not of experts that choose: they see later tokens in training, which are not there yet in decoding."""
    model = built(**CASES[case])
    asked = requests(random.Random(2), model.has_memory, count=4)
    tokens, logits = run(model, replace(Limits.of(model.config, 4), chunk=BLOCK), asked)
    for number, request in enumerate(asked, 1):
        ids = torch.tensor([[*request.prompt, *tokens[number]][:-1]])
        source = torch.tensor([request.source]) if request.source else None
        whole_SV = logits_of(model, Example(ids, encoder_tokens_BT=source))[0]
        ours_SV = torch.stack([logits[number, place + 1] for place in range(len(request.prompt) - 1, ids.shape[1])])
        torch.testing.assert_close(ours_SV, whole_SV[len(request.prompt) - 1 :], rtol=1e-5, atol=5e-5)


def test_probabilities_are_those_of_the_scores() -> None:
    model = built()
    batch = Recorded(model, Limits.of(model.config, 2))
    number = batch.add(Request((5, 6, 7), 4, Sampling(0.7, seed=3), logprobs=3))
    found = []
    while not found or found[-1].ending is None:
        found += batch.step()
    for place, new in enumerate(found, 3):
        logs = batch.logits[number, place].double().log_softmax(-1)
        assert new.logprobs is not None
        assert new.logprobs.chosen == float(logs[new.token])
        assert [token for token, _ in new.logprobs.likeliest] == logs.topk(3).indices.tolist()
    assert [new.ending for new in found] == [None, None, None, "length"]


def test_an_end_is_the_last_token() -> None:
    model = built()
    (first, second), _ = run(model, Limits.of(model.config, 1), [Request((5, 6), 9, Sampling(0))] * 2)[0].values(), None
    assert first == second
    batch = ContinuousBatch(model, Limits.of(model.config, 1))
    batch.add(Request((5, 6), 9, Sampling(0), ends=frozenset([first[3]])))
    found = [new for _ in range(9) for new in batch.step()]
    assert [new.token for new in found] == first[: first.index(first[3]) + 1]
    assert found[-1].ending == "stop" and not batch.step()


class OneOf:
    """Lets a text go on with these tokens only, and ends it after so many."""

    def __init__(self, tokens: set[int], most: int) -> None:
        self.tokens, self.left = tokens, most

    def allowed(self) -> Tensor:
        return torch.tensor([token in self.tokens for token in range(tiny_model().vocabulary)])

    def take(self, token: int) -> bool:
        assert token in self.tokens
        self.left -= 1
        return self.left > 0


def test_a_guided_text_goes_its_way_among_others() -> None:
    """Alone or in a crowd that is put back and forth, with its own tokens only; it ends where its guide has no more to
    say, and leaves nothing behind."""
    model, ways = built(), (Sampling(0), Sampling(1.0, seed=4), Sampling(1.0, top_p=0.5, seed=5))

    def told(others: list[Request], limits: Limits) -> list[list[NewToken]]:
        batch = ContinuousBatch(model, limits)
        guided = [batch.add(Request((5, 6, 7), 40, way, guide=OneOf({3, 9, 11}, 6))) for way in ways]
        for request in others:
            batch.add(request)
        found: dict[int, list[NewToken]] = {number: [] for number in guided}
        while not batch.is_idle:
            for new in batch.step():
                found.get(new.request, []).append(new)
        assert batch.scheduler.pool.available == batch.scheduler.pool.size
        return [found[number] for number in guided]

    alone = told([], Limits.of(model.config, 3))
    assert [[new.ending for new in text] for text in alone] == [[None] * 5 + ["length"]] * 3
    crowded = told(requests(random.Random(2), encodes=False), replace(Limits.of(model.config, 5), chunk=2 * BLOCK))
    assert [[new.token for new in text] for text in crowded] == [[new.token for new in text] for text in alone]
