"""Each rule of quality gives what datatrove's filter gives, on real documents and at every threshold.

Its words and sentences are replaced by ours: what is compared are the rules, their thresholds and their order.
"""

import importlib
from collections import Counter
from types import ModuleType
from typing import Any

import pytest

from data_pipelines.documents import Dropped
from data_pipelines.steps.quality.marks import MARKS, SENTENCE_ENDS, num_sentences
from data_pipelines.steps.quality.split_text import SplitText
from data_pipelines.steps.quality.step import RULES
from llmtrain.config.pipelines.quality import QualityStep
from tests.support.readers import require_datatrove
from tests.support.real_text import real_documents
from tests.unit.data_pipelines.steps import borderline

NUM_REAL = [250, pytest.param(6000, marks=pytest.mark.whole_grid)]
FILTERS = {
    "gopher": ("gopher_quality_filter", "GopherQualityFilter"),
    "gopher_repetition": ("gopher_repetition_filter", "GopherRepetitionFilter"),
    "c4": ("c4_filters", "C4QualityFilter"),
    "fineweb": ("fineweb_quality_filter", "FineWebQualityFilter"),
}
FEWEST_KEPT = 0.02
"""Manuals are much repetition and lists; a comparison of which nothing is kept would be none."""

rules = pytest.mark.parametrize("rule", FILTERS)


def filter_module(rule: str) -> ModuleType:
    """The module of a filter, whose words and sentences are ours."""
    require_datatrove()
    module = importlib.import_module(f"datatrove.pipeline.filters.{FILTERS[rule][0]}")
    if hasattr(module, "split_into_words"):
        module.split_into_words = lambda text, language: text.split()  # type: ignore[attr-defined]
    if hasattr(module, "split_into_sentences"):
        module.split_into_sentences = lambda line, language: [line] * num_sentences(line)  # type: ignore[attr-defined]
    return module


def theirs(rule: str, texts: list[str], **settings: Any) -> list[tuple[str, str]]:
    """Why the filter drops each text, and what it leaves of it."""
    module = filter_module(rule)
    document = importlib.import_module("datatrove.data").Document
    chosen = getattr(module, FILTERS[rule][1])(**settings)
    answers = []
    for text in texts:
        one = document(text=text, id="1")
        found = chosen.filter(one)
        answers.append((found[1], "") if isinstance(found, tuple) else ("", one.text))
        assert found is True or answers[-1][0]
    return answers


def ours(rule: str, texts: list[str], **keys: Any) -> list[tuple[str, str]]:
    chosen = RULES[rule](getattr(QualityStep(**{rule: keys}), rule))
    found = [chosen(SplitText(text), Counter()) for text in texts]
    return [(one.reason, "") if isinstance(one, Dropped) else ("", one.text) for one in found]


def differences(texts: list[str], our: list[tuple[str, str]], their: list[tuple[str, str]]) -> list[Any]:
    return [(text[:200], a, b) for text, a, b in zip(texts, our, their, strict=True) if a != b]


@rules
@pytest.mark.parametrize("number", NUM_REAL)
def test_real_documents(rule: str, number: int) -> None:
    texts = real_documents(number)
    found = ours(rule, texts)
    assert differences(texts, found, theirs(rule, texts)) == []
    reasons = Counter(reason for reason, _ in found)
    assert reasons[""] > FEWEST_KEPT * len(texts)
    assert len(reasons) > 2  # several tests were failed


@rules
def test_thresholds(rule: str) -> None:
    cases = {
        "gopher": borderline.gopher,
        "gopher_repetition": borderline.repetition,
        "c4": borderline.c4,
        "fineweb": borderline.fineweb,
    }[rule]
    texts = [text for _, text, *_ in cases()]
    assert differences(texts, ours(rule, texts), theirs(rule, texts)) == []


OTHERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gopher": (
        {"min_words": 20, "max_words": 500, "min_mean_word_length": 4.0, "max_mean_word_length": 6.0}
        | {"max_symbols_per_word": 0.02, "max_bullet_lines": 0.1, "max_ellipsis_lines": 0.01}
        | {"min_alphabetic_words": 0.7, "min_stop_words": 3, "stop_words": ("the", "a", "if", "not")},
        {"min_doc_words": 20, "max_doc_words": 500, "min_avg_word_length": 4.0, "max_avg_word_length": 6.0}
        | {"max_symbol_word_ratio": 0.02, "max_bullet_lines_ratio": 0.1, "max_ellipsis_lines_ratio": 0.01}
        | {"max_non_alpha_words_ratio": 0.7, "min_stop_words": 3, "stop_words": ["the", "a", "if", "not"]},
    ),
    "gopher_repetition": (
        {"max_duplicate_lines": 0.9, "max_duplicate_line_characters": 0.9, "max_duplicate_paragraphs": 0.9}
        | {"max_duplicate_paragraph_characters": 0.9, "max_top_2gram": 0.05, "max_top_3gram": 0.04}
        | {"max_top_4gram": 0.03, "max_duplicate_5grams": 0.2, "max_duplicate_6grams": 0.19}
        | {"max_duplicate_7grams": 0.1, "max_duplicate_8grams": 0.05, "max_duplicate_9grams": 0.02}
        | {"max_duplicate_10grams": 0.01},
        {"dup_line_frac": 0.9, "dup_line_char_frac": 0.9, "dup_para_frac": 0.9, "dup_para_char_frac": 0.9}
        | {"top_n_grams": ((2, 0.05), (3, 0.04), (4, 0.03))}
        | {"dup_n_grams": ((5, 0.2), (6, 0.19), (7, 0.1), (8, 0.05), (9, 0.02), (10, 0.01))},
    ),
    "c4": (
        {"terminal_punctuation": False, "citations": False, "min_line_words": 5, "max_word_length": 20}
        | {"javascript": False, "curly_brackets": False, "min_sentences": 10},
        {"filter_no_terminal_punct": False, "remove_citations": False, "min_words_per_line": 5, "max_word_length": 20}
        | {"filter_javascript": False, "filter_curly_bracket": False, "min_num_sentences": 10},
    ),
    "fineweb": (
        {"min_terminal_lines": 0.05, "max_short_lines": 0.4, "short_line": 25, "max_lines_per_word": 0.15}
        | {"max_duplicate_line_characters": 0.1},
        {"line_punct_thr": 0.05, "short_line_thr": 0.4, "short_line_length": 25, "new_line_ratio": 0.15}
        | {"char_duplicates_ratio": 0.1},
    ),
}
"""Our keys and their settings: real text is at other tests with them, such as n-grams where lines do not decide."""


@rules
@pytest.mark.parametrize("number", NUM_REAL)
def test_real_documents_with_other_thresholds(rule: str, number: int) -> None:
    texts = real_documents(number)
    keys, settings = OTHERS[rule]
    found = ours(rule, texts, **keys)
    assert differences(texts, found, theirs(rule, texts, **settings)) == []
    assert len({reason for reason, _ in found}) > (1 if rule == "c4" else 4)


def test_marks() -> None:
    require_datatrove()
    text = importlib.import_module("datatrove.utils.text")
    assert text.PUNCTUATION_SET == MARKS
    assert text.TERMINAL_PUNCTUATION == SENTENCE_ENDS


@rules
def test_a_moved_threshold_is_caught(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = {
        "gopher": {"max_symbols_per_word": 0.11},
        "gopher_repetition": {"max_duplicate_7grams": 0.1305},
        "c4": {"min_line_words": 4},
        "fineweb": {"max_short_lines": 0.68},
    }[rule]
    cases = {
        "gopher": borderline.gopher,
        "gopher_repetition": borderline.repetition,
        "c4": borderline.c4,
        "fineweb": borderline.fineweb,
    }[rule]
    texts = [text for _, text, *_ in cases()]
    assert differences(texts, ours(rule, texts, **moved), theirs(rule, texts))
