"""Who does what: the router against slow references, token by token."""

import math
from itertools import product

import pytest
import torch
from torch import Tensor

from llmtrain.config.model import MoeConfig
from llmtrain.models.experts.router import NUM_SCALARS, Router, RouterReport, capacity, experts_choose, tokens_choose
from llmtrain.parallel.parts import WHOLE, SequenceParts
from llmtrain.parallel.stateless_random import Draws, Span
from tests.support.samples import tiny_model

DRAWS = Draws.of_micro_batch(0, 1, 0, torch.device("cpu"))


def scores(num_tokens: int, num_experts: int, seed: int = 0) -> Tensor:
    return torch.rand(num_tokens, num_experts, generator=torch.Generator().manual_seed(seed)).softmax(-1)


def slow_tokens_choose(scores_NE: Tensor, top_k: int, room: int | None) -> tuple[set[tuple[int, int]], ...]:
    """All first choices in the tokens' order, then all second ones; an expert that is full takes no more."""
    wanted, kept, taken = set(), set(), [0] * scores_NE.shape[1]
    best = [sorted(range(len(row)), key=lambda e: (-row[e], e)) for row in scores_NE.tolist()]
    for choice in range(top_k):
        for token, order in enumerate(best):
            expert = order[choice]
            wanted.add((token, expert))
            if room is None or taken[expert] < room:
                kept.add((token, expert))
            taken[expert] += 1
    return wanted, kept


def pairs(chosen_NE: Tensor) -> set[tuple[int, int]]:
    return {(token, expert) for token, expert in chosen_NE.nonzero().tolist()}


@pytest.mark.parametrize(("top_k", "room", "seed"), list(product((1, 2, 3), (1, 3, 8, None), range(3))))
def test_tokens_choose_as_one_by_one(top_k: int, room: int | None, seed: int) -> None:
    table = scores(20, 4, seed)
    choice = tokens_choose(table, torch.ones(20, dtype=torch.bool), top_k, room)
    assert (pairs(choice.wanted_NE), pairs(choice.kept_NE)) == slow_tokens_choose(table, top_k, room)


def test_without_a_bound_nothing_is_dropped_and_every_token_has_its_experts() -> None:
    choice = tokens_choose(scores(50, 8), torch.ones(50, dtype=torch.bool), 2, None)
    assert torch.equal(choice.kept_NE, choice.wanted_NE)
    assert choice.kept_NE.sum(1).tolist() == [2] * 50


def test_ties_go_to_the_lower_number() -> None:
    even = torch.full((3, 4), 0.25)
    everybody = torch.ones(3, dtype=torch.bool)
    assert pairs(tokens_choose(even, everybody, 2, None).kept_NE) == {(t, e) for t in range(3) for e in (0, 1)}
    assert pairs(experts_choose(even, everybody, 2).kept_NE) == {(t, e) for t in (0, 1) for e in range(4)}


def test_padding_is_done_by_no_expert_and_takes_no_room() -> None:
    valid_N = torch.tensor([False, True] * 5)
    chosen = tokens_choose(scores(10, 2), valid_N, 1, 3).kept_NE
    alone = tokens_choose(scores(10, 2)[valid_N], torch.ones(5, dtype=torch.bool), 1, 3).kept_NE
    assert not chosen[~valid_N].any()
    assert torch.equal(chosen[valid_N], alone)
    assert not experts_choose(scores(10, 2), valid_N, 8).kept_NE[~valid_N].any()


@pytest.mark.parametrize("room", [1, 4, 9])
def test_experts_choose_their_best_tokens(room: int) -> None:
    table = scores(9, 3)
    chosen = experts_choose(table, torch.ones(9, dtype=torch.bool), room).kept_NE
    for expert in range(3):
        best = sorted(range(9), key=lambda token: (-table[token, expert].item(), token))[:room]
        assert set(chosen[:, expert].nonzero().flatten().tolist()) == set(best)


@pytest.mark.parametrize(
    ("settings", "tokens", "expected"),
    [
        ({"router": "switch", "capacity_factor": 1.25}, 64, 10),
        ({"router": "top_k", "top_k": 2, "capacity_factor": 1.0}, 64, 16),
        ({"router": "top_k", "top_k": 2, "capacity_factor": 1.0}, 3, 1),
        ({"router": "expert_choice", "top_k": 2}, 64, 16),
        ({"router": "switch", "capacity_factor": 100.0}, 64, 64),
    ],
)
def test_capacity_is_a_multiple_of_an_equal_share(settings: dict, tokens: int, expected: int) -> None:
    assert capacity(MoeConfig(num_experts=8, **settings), tokens) == expected


def router(**settings: object) -> Router:
    built = Router(tiny_model(moe={"num_experts": 4, **settings}), "decoder.0.moe")
    torch.nn.init.normal_(built.weight, std=0.5, generator=torch.Generator().manual_seed(3))
    return built


def hidden(seq_len: int = 8, batch: int = 3) -> Tensor:
    return torch.randn(seq_len, batch, 32, generator=torch.Generator().manual_seed(1))


def test_drops_happen_in_training_only() -> None:
    built = router(router="switch", capacity_factor=0.5)
    trained, evaluated = built(hidden(), None, DRAWS), built(hidden(), None, None)
    assert RouterReport.of(trained.report).dropped > 0
    assert trained.chosen_SBE.sum() == 24 - RouterReport.of(trained.report).dropped
    assert evaluated.chosen_SBE.sum() == 24


def test_tokens_queue_by_sample_and_then_by_position() -> None:
    built = router(router="switch", capacity_factor=0.5)
    with torch.no_grad():
        built.weight.zero_()  # all want expert 0, which has room for three of 24
    chosen = built(hidden(), None, DRAWS).chosen_SBE[..., 0]
    assert chosen.nonzero().tolist() == [[0, 0], [1, 0], [2, 0]]


def test_losses_and_figures_are_those_of_the_papers() -> None:
    built = router(router="top_k", top_k=2, aux_loss_coeff=0.5, z_loss_coeff=0.25)
    x_SBH = hidden()
    routing = built(x_SBH, None, DRAWS)
    logits = (x_SBH @ built.weight.T).transpose(0, 1).flatten(0, 1)
    chances = logits.softmax(-1)
    share = tokens_choose(chances, torch.ones(24, dtype=torch.bool), 2, None).wanted_NE.sum(0) / 48
    aux, z = 4 * (share * chances.mean(0)).sum(), logits.logsumexp(-1).square().mean()
    report = RouterReport.of(routing.report)
    assert report.aux_loss == pytest.approx(aux.item(), rel=1e-5)
    assert report.z_loss == pytest.approx(z.item(), rel=1e-5)
    assert routing.loss.item() == pytest.approx((0.5 * aux + 0.25 * z).item(), rel=1e-5)
    assert report.entropy == pytest.approx(torch.distributions.Categorical(chances).entropy().sum().item(), rel=1e-5)
    assert (report.tokens, report.dropped, report.load_E.sum()) == (24, 0, 48)


def test_an_equal_load_has_a_loss_of_one() -> None:
    built = router(router="top_k", top_k=1)
    table = torch.eye(4).repeat(6, 1).view(8, 3, 4)
    everybody = torch.ones(8, 3, dtype=torch.bool)
    _, (aux, _) = built.balance_losses(table.log(), torch.full((8, 3, 4), 0.25), table.bool(), everybody, WHOLE.own(8))
    assert aux.item() == pytest.approx(1.0)


@pytest.mark.parametrize("kind", ["switch", "top_k"])
def test_weights_are_probabilities(kind: str) -> None:
    built = router(router=kind, capacity_factor=1.0)
    routing, x_SBH = built(hidden(), None, DRAWS), hidden()
    chances = (x_SBH @ built.weight.T).softmax(-1)
    if kind == "top_k":
        chances = chances / chances.topk(2, dim=-1).values.sum(-1, keepdim=True)
    torch.testing.assert_close(routing.weights_sBE, torch.where(routing.chosen_SBE, chances, 0.0))


def test_the_bias_changes_the_choice_and_no_weight() -> None:
    built = router(router="top_k", top_k=1, normalize_weights=False, bias_update_rate=0.1)
    before = built(hidden(), None, None)
    built.bias_E = torch.tensor([0.0, 0.0, 10.0, 0.0])
    after = built(hidden(), None, None)
    assert after.chosen_SBE[..., 2].all()
    assert not before.chosen_SBE[..., 2].all()
    chances = (hidden() @ built.weight.T).softmax(-1)
    torch.testing.assert_close(after.weights_sBE[..., 2], chances[..., 2])


def test_jitter_is_bounded_noise_by_global_index() -> None:
    built = router(jitter=0.1)
    x_SBH = torch.ones(8, 3, 32)
    noisy = built.jittered(x_SBH, DRAWS)
    assert 0.9 <= noisy.min() < 0.91
    assert 1.09 < noisy.max() <= 1.1
    assert noisy.mean().item() == pytest.approx(1.0, abs=0.01)
    part = built.jittered(x_SBH[:4], DRAWS.with_sequence(Span(4, 8)))
    assert torch.equal(part, noisy[4:])
    assert built.jittered(x_SBH, None) is x_SBH


class TwoParts(SequenceParts):
    """One of two ranks, which knows what the other would send."""

    def __init__(self, place: int, whole: Tensor) -> None:
        super().__init__(place, 2)
        object.__setattr__(self, "whole", whole)

    def gather(self, x_s: Tensor) -> Tensor:
        torch.testing.assert_close(x_s.detach(), self.own(len(self.whole)).of(self.whole))  # type: ignore[attr-defined]
        return self.whole  # type: ignore[attr-defined]


def test_parts_of_the_sequence_decide_and_sum_up_as_the_whole() -> None:
    built = router(router="switch", capacity_factor=0.75, z_loss_coeff=0.1)
    whole = built(hidden(), None, DRAWS)
    chances = (hidden() @ built.weight.T).softmax(-1).detach()
    parts = []
    for place in range(2):
        built.parts = TwoParts(place, chances)
        parts.append(built(hidden()[place * 4 : place * 4 + 4], None, DRAWS))
    assert all(torch.equal(part.chosen_SBE, whole.chosen_SBE) for part in parts)
    torch.testing.assert_close(torch.cat([part.weights_sBE for part in parts]), whole.weights_sBE)
    torch.testing.assert_close(sum(part.loss for part in parts), whole.loss)
    torch.testing.assert_close(sum(part.report for part in parts), whole.report)


def test_a_report_has_a_fixed_length() -> None:
    assert len(router()(hidden(), None, DRAWS).report) == NUM_SCALARS + 4
    assert not any(map(math.isnan, router()(hidden(), torch.zeros(3, 8, dtype=torch.bool), DRAWS).report.tolist()))
