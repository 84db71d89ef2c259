from itertools import islice

import pytest
import torch

from llmtrain.errors import ConfigError
from llmtrain.infer.generate import Sampling, choose, iter_tokens
from llmtrain.models.build import build_model, materialize
from llmtrain.models.transformer import Transformer
from tests.support.samples import tiny_model

PROBABILITIES = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15])


def built() -> Transformer:
    model = build_model(tiny_model())
    materialize(model, seed=1, device=torch.device("cpu"))
    return model.eval()


def shares(sampling: Sampling, draws: int = 4000) -> list[float]:
    generator = torch.Generator().manual_seed(0)
    chosen = [choose(PROBABILITIES.log(), sampling, generator) for _ in range(draws)]
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
        (Sampling(temperature=0.5), [0.01 / 0.285, 0.16 / 0.285, 0.0025 / 0.285, 0.09 / 0.285, 0.0225 / 0.285]),
    ],
)
def test_draws_have_the_right_shares(sampling: Sampling, expected: list[float]) -> None:
    assert shares(sampling) == pytest.approx(expected, abs=0.03)


def test_greedy_tokens_equal_those_of_the_whole_sequence() -> None:
    model, ids = built(), [5, 17, 300]
    generated = list(iter_tokens(model, ids, Sampling(temperature=0), max_tokens=20))
    for token in generated:
        tokens_BS = torch.tensor([ids])
        logits = model.logits(model(tokens_BS, torch.arange(len(ids))[None]))
        assert token == int(logits[0, -1].argmax())
        ids.append(token)


def test_the_same_seed_draws_the_same_text() -> None:
    model = built()

    def run(seed: int) -> list[int]:
        return list(iter_tokens(model, [5, 17], Sampling(seed=seed), max_tokens=30))

    assert run(1) == run(1)
    assert run(1) != run(2)


def test_ends_at_the_longest_sequence() -> None:
    model = built()
    assert len(list(iter_tokens(model, [1] * 60, Sampling(), max_tokens=100))) == 4
    with pytest.raises(ConfigError, match="at least 1 and fewer than 64"):
        next(iter_tokens(model, [1] * 64, Sampling(), max_tokens=1))


def test_stopping_early_computes_no_more() -> None:
    model, calls = built(), []
    model.register_forward_hook(lambda *_: calls.append(1))
    list(islice(iter_tokens(model, [1, 2], Sampling(), max_tokens=50), 3))
    assert len(calls) == 3


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_values_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="must be"):
        Sampling(**wrong)  # type: ignore[arg-type]
