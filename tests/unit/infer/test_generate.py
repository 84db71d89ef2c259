from itertools import islice
from typing import Any

import pytest
import torch

from llmtrain.errors import ConfigError
from llmtrain.infer.batching.request import Request
from llmtrain.infer.batching.sampling import Sampling, choose, drawn
from llmtrain.infer.fillings import fill_masks
from llmtrain.infer.generate import iter_tokens
from llmtrain.infer.model import logits_of
from llmtrain.interop.examples import Example
from llmtrain.models.transformer import Transformer, build_model
from tests.support.samples import tiny_model
from tests.support.weights import materialize

GREEDY = Sampling(temperature=0)
PROBABILITIES = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15])


def built(**changes: Any) -> Transformer:
    model = build_model(tiny_model(**changes))
    materialize(model, seed=1, device=torch.device("cpu"))
    return model.eval()


def shares(sampling: Sampling, draws: int = 4000) -> list[float]:
    chosen = [choose(PROBABILITIES.log(), sampling, drawn(0, 0, number)) for number in range(draws)]
    return [chosen.count(token) / draws for token in range(5)]


def test_greedy_takes_the_likeliest() -> None:
    assert shares(Sampling(temperature=0), draws=3) == [0, 1, 0, 0, 0]


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(), [0.1, 0.4, 0.05, 0.3, 0.15]),
        (Sampling(top_k=2), [0, 4 / 7, 0, 3 / 7, 0]),
        (Sampling(top_p=0.75), [0, 0.4 / 0.85, 0, 0.3 / 0.85, 0.15 / 0.85]),  # 0.4 + 0.3 is not yet 0.75
        (Sampling(top_k=2, top_p=0.5), [0, 1, 0, 0, 0]),  # of the two left, the first has 4/7
        (Sampling(min_p=0.3), [0, 0.4 / 0.85, 0, 0.3 / 0.85, 0.15 / 0.85]),  # 0.12 is the least
        (Sampling(temperature=0.5), [0.01 / 0.285, 0.16 / 0.285, 0.0025 / 0.285, 0.09 / 0.285, 0.0225 / 0.285]),
    ],
)
def test_draws_have_the_right_shares(sampling: Sampling, expected: list[float]) -> None:
    assert shares(sampling) == pytest.approx(expected, abs=0.03)


def test_greedy_tokens_equal_those_of_the_whole_sequence() -> None:
    model, ids = built(), [5, 17, 300]
    generated = list(iter_tokens(model, Request(tuple(ids), 20, GREEDY)))
    for token in generated:
        tokens_BS = torch.tensor([ids])
        assert token == int(logits_of(model, Example(tokens_BS))[0, -1].argmax())
        ids.append(token)


def test_the_same_seed_draws_the_same_text() -> None:
    model = built()

    def run(seed: int) -> list[int]:
        return list(iter_tokens(model, Request((5, 17), 30, Sampling(seed=seed))))

    assert run(1) == run(1)
    assert run(1) != run(2)


def test_ends_at_the_longest_sequence() -> None:
    model = built()
    assert len(list(iter_tokens(model, Request((1,) * 60, 100)))) == 4


def test_stopping_early_computes_no_more() -> None:
    model, calls = built(), []
    model.register_forward_hook(lambda *_: calls.append(1))
    list(islice(iter_tokens(model, Request((1, 2), 50)), 3))
    assert len(calls) == 3


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}, {"min_p": 1.0}]
)
def test_values_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="must be"):
        Sampling(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("position", ["t5_relative", "rope", "learned"])
def test_a_decoder_behind_an_encoder_gives_the_tokens_of_the_whole_sequence(position: str) -> None:
    model = built(family="encoder_decoder", num_encoder_layers=3, position=position, init={"std": 0.3})
    prompt, ids = [5, 17, 300, 8, 41], [0]
    for token in iter_tokens(model, Request((0,), 20, GREEDY, source=tuple(prompt))):
        logits = logits_of(model, Example(torch.tensor([ids]), encoder_tokens_BT=torch.tensor([prompt])))
        assert token == int(logits[0, -1].argmax())
        ids.append(token)
    assert len(set(ids)) > 3, "the tokens depend on something"


def test_the_encoder_runs_once() -> None:
    model, calls = built(family="encoder_decoder"), []
    assert model.encoder is not None
    model.encoder.register_forward_hook(lambda *_: calls.append(1))
    assert len(list(iter_tokens(model, Request((0,), 9, source=(5, 17))))) == 9
    assert len(calls) == 1


def test_masks_are_filled_with_the_likeliest_tokens() -> None:
    model, mask = built(family="encoder", head="mlm", position="learned"), 4
    ids = [5, mask, 17, mask]
    first, second = fill_masks(model, ids, mask, 3)
    assert (first.position, second.position) == (1, 3)
    probabilities = logits_of(model, Example(torch.tensor([ids])))[0, 3].softmax(-1)
    assert second.tokens[0] == (int(probabilities.argmax()), pytest.approx(float(probabilities.max())))
    assert [chance for _, chance in first.tokens] == sorted((chance for _, chance in first.tokens), reverse=True)
