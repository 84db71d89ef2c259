"""Rules within the steps of a data pipeline: a step that cannot do anything, a key that no step reads. Pure."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from llmtrain.config.pipelines.quality import QualityStep
from llmtrain.config.pipelines.steps import (
    DecontaminateStep,
    HtmlStep,
    LanguageStep,
    LengthStep,
    NormalizeStep,
    PiiStep,
    StepConfig,
    UrlsStep,
    WordsStep,
)
from llmtrain.errors import Problem

Found = Iterator[Problem]


def step_problems(steps: Sequence[StepConfig], key: str = "steps") -> list[Problem]:
    """Every rule that a step breaks; `key` is the place of the list in the configuration."""
    return [
        Problem(f"{key}.{number}.{problem.key}", problem.message, problem.value)
        for number, step in enumerate(steps)
        if step.name in STEP_RULES
        for problem in STEP_RULES[step.name](step.section)
    ]


def _in_order(least: str, greatest: str, section: Any, above: str) -> Found:
    """A lower bound that is above its upper bound lets nothing pass."""
    low, high = getattr(section, least), getattr(section, greatest)
    if low is not None and high is not None and low > high:
        message = f"is above {above}.{greatest} = {high}: nothing would be left. Try {high}, or less."
        yield Problem(f"{above}.{least}", message, low)


def normalizes_something(section: NormalizeStep) -> Found:
    parts = (section.form, section.control_characters, section.trailing_space, section.ftfy)
    if not any(parts) and section.max_blank_lines is None:
        yield Problem("normalize", "has all its parts off. Remove the step, or try form: NFC.")


def html_extractor_has_keys(section: HtmlStep) -> Found:
    if section.extractor == "trafilatura" and not section.main_content:
        message = "trafilatura gives the main text alone. Try true, or extractor: resiliparse."
        yield Problem("html.main_content", message, "false")


def languages_are_named_once(section: LanguageStep) -> Found:
    for language in sorted(name for name in set(section.keep or ()) if (section.keep or ()).count(name) > 1):
        yield Problem("language.keep", f"has {language} more than once. Remove one.", language)


def quality_rules_have_keys(section: QualityStep) -> Found:
    for name in sorted(set(section.rules)):
        if section.rules.count(name) > 1:
            yield Problem("quality.rules", f"has {name} more than once. Remove one.", name)
    for name in sorted(section.model_fields_set - {"rules", *section.rules}):
        message = f"is not read: quality.rules has no {name}. Add it to quality.rules, or remove its keys."
        yield Problem(f"quality.{name}", message)
    yield from _in_order("min_words", "max_words", section.gopher, "quality.gopher")
    yield from _in_order("min_mean_word_length", "max_mean_word_length", section.gopher, "quality.gopher")
    number = len(set(section.gopher.stop_words))
    if section.gopher.min_stop_words is not None and section.gopher.min_stop_words > number:
        message = f"is more than there are in quality.gopher.stop_words: {number}. Try {min(2, number)}."
        yield Problem("quality.gopher.min_stop_words", message, section.gopher.min_stop_words)
    fineweb = section.fineweb
    if fineweb.short_line is None and "max_short_lines" in fineweb.model_fields_set and fineweb.max_short_lines:
        message = "is not read: quality.fineweb.short_line = null. Try short_line: 30, or null here."
        yield Problem("quality.fineweb.max_short_lines", message, fineweb.max_short_lines)


def lengths_are_in_order(section: LengthStep) -> Found:
    yield from _in_order("min_characters", "max_characters", section, "length")


def pii_has_a_kind(section: PiiStep) -> Found:
    if not (section.mails or section.ip_addresses or section.phones):
        yield Problem("pii", "has all its kinds off. Remove the step, or try mails: true.")
    keys = {
        "mails": ("mail_text",),
        "ip_addresses": ("public_only", "ipv4_text", "ipv6_text"),
        "phones": ("phone_regions", "phone_text"),
    }
    for kind, names in keys.items():
        for name in sorted(section.model_fields_set & set(names)):
            if not getattr(section, kind):
                yield Problem(f"pii.{name}", f"is not read: pii.{kind} = false. Remove it, or try {kind}: true.")


def words_have_a_limit(section: WordsStep) -> Found:
    if section.max_count is None and section.max_share is None:
        yield Problem("words", "has neither max_count nor max_share: it would drop nothing. Try max_count: 0.")
    if section.max_share is not None and section.max_count == 0:
        message = "is not reached: words.max_count = 0 drops a document at the first word. Try max_count: null."
        yield Problem("words.max_share", message, section.max_share)


def urls_have_a_list(section: UrlsStep) -> Found:
    if not (section.domains or section.urls or section.words) and section.without_url == "keep":
        yield Problem("urls", "has no list. Name files under urls.domains, urls.urls or urls.words.")
    elif not (section.domains or section.urls or section.words) and section.mode == "allow":
        message = "has no list, so that every document would be dropped. Name files under urls.domains."
        yield Problem("urls.mode", message, section.mode)


def matches_have_a_length(section: DecontaminateStep) -> Found:
    if section.min_words > section.ngram:
        message = f"is above decontaminate.ngram = {section.ngram}: shorter texts match whole. Try {section.ngram}."
        yield Problem("decontaminate.min_words", message, section.min_words)


STEP_RULES: dict[str, Callable[[Any], Found]] = {
    "normalize": normalizes_something,
    "html": html_extractor_has_keys,
    "language": languages_are_named_once,
    "quality": quality_rules_have_keys,
    "length": lengths_are_in_order,
    "pii": pii_has_a_kind,
    "words": words_have_a_limit,
    "urls": urls_have_a_list,
    "decontaminate": matches_have_a_length,
}
