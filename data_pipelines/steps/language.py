"""The step `language`: which language a document is in, by py3langid (Lui and Baldwin 2012) and its begin."""

from collections import Counter
from dataclasses import replace
from functools import cache
from typing import Any

from data_pipelines.documents import Document, Dropped
from llmtrain.config.pipelines.steps import LanguageStep


class Language:
    """Notes the language of a document, and drops those in another than is kept."""

    def __init__(self, section: LanguageStep) -> None:
        self._section = section
        self._keep = None if section.keep is None else frozenset(section.keep)
        self._identifier = _identifier()

    def __call__(self, document: Document, counts: Counter[str]) -> Document | Dropped:
        """The document with its language, or why it is dropped; `counts` has the number in each language."""
        section = self._section
        language, probability = self._identifier.classify(_begin(document.text, section.characters))
        if probability < section.min_probability:
            return Dropped("uncertain")
        if self._keep is not None and language not in self._keep:
            return Dropped("language")
        counts[f"language_{language}"] += 1
        return document if document.language == language else replace(document, language=language)


def _begin(text: str, characters: int) -> str:
    """The first so many characters, where all white space is one blank: lines of a few words are no language."""
    length = characters
    while True:
        begin = " ".join(text[:length].split())[:characters]
        if len(begin) == characters or length >= len(text):
            return begin
        length *= 4


@cache
def _identifier() -> Any:
    """The model, once in a process: 20 MB, half a second. Its own file, which holds arrays and no pickle."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
