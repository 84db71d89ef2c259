"""Each rule of quality at its thresholds, on both sides, and what can be set."""

from collections import Counter
from typing import Any

import numpy as np
import pytest

from data_pipelines.documents import Document, Dropped
from data_pipelines.steps.quality import repetition
from data_pipelines.steps.quality.split_text import SplitText
from data_pipelines.steps.quality.step import Quality
from llmtrain.config.pipelines.quality import QualityStep
from tests.support.real_text import real_documents
from tests.unit.data_pipelines.steps import borderline

CASES = {"gopher": borderline.gopher, "gopher_repetition": borderline.repetition, "fineweb": borderline.fineweb}


def outcome(text: str, counts: Counter[str] | None = None, **keys: Any) -> tuple[str, str]:
    """Why a text is dropped by a step with these keys, and the text that is left of it."""
    found = Quality(QualityStep(**keys))(Document("1", text), counts if counts is not None else Counter())
    return (found.reason, "") if isinstance(found, Dropped) else ("", found.text)


@pytest.mark.parametrize("rule", CASES)
def test_both_sides_of_each_threshold(rule: str) -> None:
    cases = list(CASES[rule]())
    assert len({name for name, _, _ in cases}) == len(cases)
    wrong = {name: outcome(text, rules=(rule,))[0] for name, text, _ in cases}
    assert wrong == {name: reason for name, _, reason in cases}


def test_c4_keeps_sentences() -> None:
    cases = list(borderline.c4())
    found = {name: outcome(text, rules=("c4",)) for name, text, _, _ in cases}
    assert found == {name: (reason, left) for name, _, reason, left in cases}


def test_lines_that_c4_takes_out_are_counted() -> None:
    counts = Counter[str]()
    for _, text, _, _ in borderline.c4():
        outcome(text, counts, rules=("c4",))
    assert set(counts) == {
        f"c4_lines_{name}" for name in ("too_long_word", "no_terminal_punc", "too_few_words", "javascript", "policy")
    }
    assert counts["c4_lines_policy"] == 6


EVERY_REASON = {"gopher": 10, "gopher_repetition": 14, "fineweb": 5}


@pytest.mark.parametrize("rule", CASES)
def test_every_test_of_a_rule_is_tried(rule: str) -> None:
    reasons = {reason for _, _, reason in CASES[rule]()} - {""}
    assert len(reasons) == EVERY_REASON[rule]


@pytest.mark.parametrize("rule", ["gopher", "gopher_repetition", "c4", "fineweb"])
def test_null_turns_a_test_off(rule: str) -> None:
    section = type(getattr(QualityStep(), rule))
    off = {name: False if field.annotation is bool else None for name, field in section.model_fields.items()}
    off.pop("stop_words", None)
    texts = [text for _, text, *_ in (borderline.c4() if rule == "c4" else CASES[rule]()) if text.strip()]
    for text in texts:
        assert outcome(text, rules=(rule,), **{rule: off})[0] == ""


def test_rules_are_asked_in_their_order_and_see_what_is_left() -> None:
    """C4 leaves no line that ends without a mark, which FineWeb would drop the document for."""
    sentences = "\n".join(f"{' '.join(borderline.words(8, 6, salt))}." for salt in "abcde")
    others = "\n".join(" ".join(borderline.words(8, 6, f"x{salt}")) for salt in "abcdefghijklmnopqrstuvwxyz" * 2)
    assert outcome(f"{sentences}\n{others}", rules=("fineweb",))[0] == "line_punct_ratio"
    assert outcome(f"{sentences}\n{others}", rules=("c4", "fineweb")) == ("", sentences)


def test_a_document_that_stays_as_it_is_is_the_same_object() -> None:
    document = Document("1", next(text for name, text, _, _ in borderline.c4() if name == "five sentences"))
    assert Quality(QualityStep(rules=("c4",)))(document, Counter()) is document


def test_sorting_without_packing_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts of many million words do not fit into the bits that are sorted at once."""
    texts = [*real_documents(40), *(text for _, text, _ in borderline.repetition())]
    before = [outcome(text, rules=("gopher_repetition",)) for text in texts]
    monkeypatch.setattr(repetition, "_SORTED_BITS", 0)
    assert [outcome(text, rules=("gopher_repetition",)) for text in texts] == before


def test_ngrams_that_occur_again_are_those_that_counting_finds() -> None:
    text = "a b a b a b c a b a b d d d d d d e a b c a b"
    words = SplitText(text)
    every = np.arange(len(words.ids))
    found = repetition._Repeated(every, words.ids, every[:0], every[:0])
    for n in range(2, 8):
        found = repetition._repeated_ngrams(words, found, n)
        places: dict[tuple[str, ...], list[int]] = {}
        for place in range(len(words.words) - n + 1):
            places.setdefault(tuple(words.words[place : place + n]), []).append(place)
        again = sorted(some for some in places.values() if len(some) > 1)
        groups: dict[int, list[int]] = {}
        for place, number in zip(found.places.tolist(), found.numbers.tolist(), strict=True):
            groups.setdefault(number, []).append(place)
        assert sorted(groups.values()) == again
