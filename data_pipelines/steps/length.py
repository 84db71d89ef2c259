"""The step `length`: documents of a number of characters and words within bounds."""

from collections import Counter

from data_pipelines.documents import Document, Dropped
from llmtrain.config.pipelines.steps import LengthStep


class Length:
    """Drops what is too short or too long. Lengths are taken without white space at the ends."""

    def __init__(self, section: LengthStep) -> None:
        self._section = section

    def __call__(self, document: Document, counts: Counter[str]) -> Document | Dropped:
        """The document, or why it is dropped."""
        section, text = self._section, document.text.strip()
        if len(text) < section.min_characters:
            return Dropped("too_short")
        if section.max_characters is not None and len(text) > section.max_characters:
            return Dropped("too_long")
        # Words and the blanks between them: so short a text need not be split.
        if section.min_words and (len(text) < 2 * section.min_words - 1 or len(text.split()) < section.min_words):
            return Dropped("too_few_words")
        return document
