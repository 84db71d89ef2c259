"""A text's log-likelihood is what the model says of it alone, whatever is in its batch."""

import random

import pytest
import torch

from llmtrain.data.tasks.samples import TaskSample
from llmtrain.data.tasks.tokens import ScoredText, TextEncoder
from llmtrain.errors import DataError
from llmtrain.infer.evaluation.scoring import log_likelihoods
from llmtrain.infer.model import logits_of
from llmtrain.interop.examples import Example
from llmtrain.models.transformer import Transformer
from tests.unit.infer.batching.test_batch import CASES, SHORT, built


def alone(model: Transformer, text: ScoredText) -> tuple[float, bool]:
    """The log-likelihood by the definition, token by token, in float64."""
    source = torch.tensor([text.source]) if text.source else None
    logs_SV = (
        logits_of(model, Example(torch.tensor([text.ids[:-1]]), encoder_tokens_BT=source))[0].double().log_softmax(-1)
    )
    places = range(text.first, len(text.ids))
    return (
        sum(float(logs_SV[at - 1, text.ids[at]]) for at in places),
        all(int(logs_SV[at - 1].argmax()) == text.ids[at] for at in places),
    )


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if case in SHORT else pytest.mark.whole_grid) for case in CASES]
)
def test_batched_is_alone(case: str):
    model, rng = built(**CASES[case]), random.Random(3)
    encodes = model.config.family == "encoder_decoder"
    texts = list[ScoredText]()
    for _ in range(12):
        ids = tuple(rng.randrange(300) for _ in range(rng.randrange(2, 90)))
        source = tuple(rng.randrange(300) for _ in range(rng.randrange(1, 60))) if encodes else ()
        texts.append(ScoredText(ids, rng.randrange(1, len(ids)), source))
    for found, text in zip(log_likelihoods(model, texts, 400), texts, strict=True):
        total, greedy = alone(model, text)
        assert found.total == pytest.approx(total, rel=1e-5, abs=1e-4)
        assert (found.greedy, found.num_tokens) == (greedy, text.num_scored)


def test_the_likeliest_tokens_are_known():
    model = built()
    first = int(logits_of(model, Example(torch.tensor([[5, 6]])))[0, -1].argmax())
    best, other = log_likelihoods(model, [ScoredText((5, 6, first), 2), ScoredText((5, 6, first ^ 1), 2)])
    assert (best.greedy, other.greedy) == (True, False)


class Characters:
    """A tokenizer whose ids are those of characters."""

    def encode(self, text: str) -> list[int]:
        return [ord(character) for character in text]


def encoder(limit: int, bos_ids: tuple[int, ...] = ()) -> TextEncoder:
    return TextEncoder(Characters(), limit, bos_ids, begin_id=0)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("length", [1, 4, 5, 9, 12])
@pytest.mark.parametrize("bos_ids", [(), (7,)])
def test_windows_score_every_token_once_behind_what_there_is_room_for(length: int, bos_ids: tuple[int, ...]):
    text = "abcdefghijkl"[:length]
    windows = list(encoder(4, bos_ids).windows(text))
    assert "".join(map(chr, (token for window in windows for token in window.ids[window.first :]))) == text
    assert all(len(window.ids) <= 5 and window.first >= 1 for window in windows)
    assert windows[0].ids[0] == (bos_ids or (0,))[0]
    if length > 5:
        assert len(windows[-1].ids) == 5  # the last one has as much before it as there is room for


def test_a_pair_gives_white_space_to_the_continuation_and_loses_its_begin():
    assert encoder(9).pair("ab ", "c") == ScoredText(tuple(map(ord, "ab c")), 2)
    assert encoder(9).pair("", "c") == ScoredText((0, ord("c")), 1)
    assert encoder(9, (7,)).pair("a", "b") == ScoredText((7, ord("a"), ord("b")), 2)
    assert encoder(3).pair("abcdef", "gh") == ScoredText(tuple(map(ord, "efgh")), 2)
    assert encoder(2).pair("abc", "ef") == ScoredText(tuple(map(ord, "cef")), 1)  # at least one is given


@pytest.mark.parametrize("prompt", ["a", ""])
def test_what_would_be_scored_in_part_is_refused(prompt: str):
    sample = TaskSample(3, prompt, ("e", "efg"), choices=("e", "efg"))
    with pytest.raises(DataError, match=r"sample 3 \(from 0\): what is scored has 3 tokens, and 2 fit"):
        encoder(2).texts(sample)
    assert len(encoder(2).texts(TaskSample(3, "", ("efg",)))) == 2, "a text is read in windows"
