"""Steps of data pipelines that could not do what they say are refused."""

from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from llmtrain.config.pipelines.steps import AnyStep, StepConfig
from llmtrain.config.rules.steps import STEP_RULES, step_problems

STEPS = TypeAdapter(list[AnyStep])


def problems(step: str, keys: dict[str, Any]) -> dict[str, str]:
    """The dotted keys that are wrong, and why."""
    found = step_problems(STEPS.validate_python(["length", {step: keys}]))
    return {problem.key.removeprefix("steps.1."): problem.message for problem in found}


@pytest.mark.parametrize(
    ("step", "keys", "key", "says"),
    [
        (
            "normalize",
            {"form": None, "control_characters": False, "trailing_space": False, "max_blank_lines": None},
            "normalize",
            "has all its parts off.",
        ),
        ("html", {"extractor": "trafilatura", "main_content": False}, "html.main_content", "extractor: resiliparse"),
        ("language", {"keep": ["en", "de", "en"]}, "language.keep", "has en more than once."),
        ("quality", {"rules": ["c4", "c4"]}, "quality.rules", "has c4 more than once."),
        ("quality", {"rules": ["gopher"], "c4": {"min_sentences": 3}}, "quality.c4", "quality.rules has no c4."),
        (
            "quality",
            {"gopher": {"min_words": 10, "max_words": 5}},
            "quality.gopher.min_words",
            "is above quality.gopher.max_words = 5: nothing would be left. Try 5, or less.",
        ),
        (
            "quality",
            {"gopher": {"min_mean_word_length": 11.0}},
            "quality.gopher.min_mean_word_length",
            "is above quality.gopher.max_mean_word_length = 10.0",
        ),
        (
            "quality",
            {"gopher": {"stop_words": ["a", "a"]}},
            "quality.gopher.min_stop_words",
            "is more than there are in quality.gopher.stop_words: 1. Try 1.",
        ),
        (
            "quality",
            {"rules": ["fineweb"], "fineweb": {"short_line": None, "max_short_lines": 0.5}},
            "quality.fineweb.max_short_lines",
            "is not read: quality.fineweb.short_line = null.",
        ),
        ("length", {"min_characters": 10, "max_characters": 9}, "length.min_characters", "Try 9, or less."),
        ("pii", {"mails": False, "ip_addresses": False, "phones": False}, "pii", "has all its kinds off."),
        ("pii", {"mails": False, "mail_text": "x"}, "pii.mail_text", "is not read: pii.mails = false."),
        ("pii", {"ip_addresses": False, "public_only": True}, "pii.public_only", "is not read"),
        ("pii", {"phones": False, "phone_regions": ["US"]}, "pii.phone_regions", "is not read"),
        ("words", {"files": ["w"], "max_count": None}, "words", "it would drop nothing. Try max_count: 0."),
        ("words", {"files": ["w"], "max_share": 0.1}, "words.max_share", "Try max_count: null."),
        ("urls", {}, "urls", "has no list."),
        ("urls", {"mode": "allow", "without_url": "drop"}, "urls.mode", "every document would be dropped."),
        ("decontaminate", {"files": ["e"], "ngram": 5}, "decontaminate.min_words", "Try 5."),
    ],
)
def test_what_is_refused(step: str, keys: dict[str, Any], key: str, says: str) -> None:
    found = problems(step, keys)
    assert list(found) == [key]
    assert says in found[key]


@pytest.mark.parametrize(
    ("step", "keys"),
    [
        ("normalize", {}),
        ("html", {"main_content": False}),
        ("language", {"keep": ["en"]}),
        ("quality", {"rules": ["gopher", "c4"], "c4": {"min_sentences": 3}, "gopher": {"max_words": None}}),
        ("quality", {"rules": ["fineweb"], "fineweb": {"short_line": None, "max_short_lines": None}}),
        ("length", {"min_characters": 9, "max_characters": 9}),
        ("pii", {"mails": False, "phones": False, "public_only": False}),
        ("words", {"files": ["w"], "max_count": None, "max_share": 0.1}),
        ("urls", {"without_url": "drop"}),
        ("urls", {"domains": ["d"], "mode": "allow"}),
        ("decontaminate", {"files": ["e"], "ngram": 5, "min_words": 5}),
    ],
)
def test_what_is_not(step: str, keys: dict[str, Any]) -> None:
    assert problems(step, keys) == {}


def test_every_step_over_one_document_has_rules() -> None:
    assert STEP_RULES.keys() == StepConfig.model_fields.keys() - {"exact_dedup", "near_dedup"}


@pytest.mark.parametrize(
    ("step", "keys"),
    [
        ("language", {"keep": ["english"]}),
        ("language", {"keep": []}),
        ("quality", {"rules": []}),
        ("quality", {"rules": ["gophers"]}),
        ("quality", {"gopher": {"max_bullet_lines": 1.5}}),
        ("pii", {"phone_regions": ["us"]}),
        ("pii", {"mail_text": "a\nb"}),
        ("words", {}),
        ("words", {"files": []}),
        ("decontaminate", {"files": ["e"], "ngram": 0}),
        ("html", {"extractor": "other"}),
        ("normalize", {"form": "nfc"}),
    ],
)
def test_values_that_no_step_takes(step: str, keys: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        STEPS.validate_python([{step: keys}])
