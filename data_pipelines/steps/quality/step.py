"""The step `quality`: the rules of its list, one after another, over one split of the text."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from data_pipelines.documents import Document, Dropped
from data_pipelines.steps.quality.c4 import C4Rule
from data_pipelines.steps.quality.fineweb import FineWebRule
from data_pipelines.steps.quality.gopher import GopherRule
from data_pipelines.steps.quality.repetition import RepetitionRule
from data_pipelines.steps.quality.split_text import SplitText
from llmtrain.config.pipelines.quality import QualityStep

Rule = Callable[[SplitText, Counter[str]], SplitText | Dropped]
"""The words that the next rule sees, the same where the text stays as it is, or why the document is dropped."""

RULES: dict[str, Callable[[Any], Rule]] = {
    "gopher": GopherRule,
    "gopher_repetition": RepetitionRule,
    "c4": C4Rule,
    "fineweb": FineWebRule,
}
"""How each rule is built from its section, which has its name."""


class Quality:
    """Drops documents that fail a rule."""

    def __init__(self, section: QualityStep) -> None:
        self._rules = [RULES[name](getattr(section, name)) for name in section.rules]

    def __call__(self, document: Document, counts: Counter[str]) -> Document | Dropped:
        """The document, with the text that the rules left of it, or the first test that it failed."""
        words = SplitText(document.text)
        for rule in self._rules:
            found = rule(words, counts)
            if isinstance(found, Dropped):
                return found
            words = found
        return document if words.text is document.text else replace(document, text=words.text)
