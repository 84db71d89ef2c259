"""The step `words`: documents with words of a list, as C4 left out pages with bad words (Raffel et al. 2020, 2.2)."""

import re
from collections import Counter, defaultdict

from data_pipelines.documents import Document, Dropped
from data_pipelines.steps.lists import read_entries
from llmtrain.config.pipelines.steps import WordsStep

_PARTS = re.compile(r"\w+|[^\w\s]")
"""Words and single marks: an entry is found where it stands between two of them, whatever white space is in it."""

_WORDS = re.compile(r"\w+")


class WordList:
    """Drops documents with too many words of the lists. An entry is one or more words, in capitals or not."""

    def __init__(self, section: WordsStep) -> None:
        self._section = section
        entries = read_entries(section.files, _parts, "a word")
        self._single = frozenset(entry[0] for entry in entries if len(entry) == 1)
        longer: dict[str, set[tuple[str, ...]]] = defaultdict(set)
        for entry in entries:
            if len(entry) > 1:
                longer[entry[0]].add(entry)
        self._longer = dict(longer)
        self._first = self._single | self._longer.keys()

    def __call__(self, document: Document, counts: Counter[str]) -> Document | Dropped:
        """The document, or why it is dropped; `counts` has the number of words of the lists that were found."""
        parts = _PARTS.findall(document.text.lower())
        if self._first.isdisjoint(parts):
            return document
        found = sum(part in self._single for part in parts)
        if self._longer:
            found += sum(
                tuple(parts[place : place + len(entry)]) == entry
                for place, part in enumerate(parts)
                if part in self._longer
                for entry in self._longer[part]
            )
        if not found:
            return document
        counts["listed_words"] += found
        section = self._section
        if section.max_count is not None and found > section.max_count:
            return Dropped("listed_words")
        if section.max_share is not None and found > section.max_share * len(_WORDS.findall(document.text)):
            return Dropped("listed_share")
        return document


def _parts(entry: str) -> tuple[str, ...]:
    return tuple(_PARTS.findall(entry.lower()))
