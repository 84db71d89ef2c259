"""The step `decontaminate`: documents with text of evaluation sets in them (Brown et al. 2020, appendix C).

Words in a row are compared by a hash of 64 bits, which is the same in every process. A bit table says of nearly all of
a document's that they are in no set; the rest are looked up.
"""

import re
import unicodedata
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_pipelines.documents import Document, Dropped
from data_pipelines.steps.lists import iter_texts
from llmtrain.config.pipelines.steps import DecontaminateStep
from llmtrain.errors import ConfigError

_WORDS = re.compile(r"\w+")
_BASE = np.uint64(0x9E3779B97F4A7C15)
_BITS_PER_NGRAM = 16
_MOST_BITS = 28

Hashes = NDArray[np.uint64]


@dataclass(frozen=True)
class _Ngrams:
    """The n-grams of all sets for one n.

    `hashes` [H] are in order, `sets` [H] the number of the first set that each is of. `table` [2 ** bits] is true at
    the upper bits of each hash.
    """

    hashes: Hashes
    sets: NDArray[np.int64]
    table: NDArray[np.bool_]
    bits: int

    def places_in(self, hashes: Hashes) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Where a document's hashes are among them, and of which sets."""
        places = np.flatnonzero(self.table[hashes >> np.uint64(64 - self.bits)])
        rows = np.minimum(np.searchsorted(self.hashes, hashes[places]), len(self.hashes) - 1)
        found = self.hashes[rows] == hashes[places]
        return places[found], self.sets[rows[found]]


class Contamination:
    """Drops documents too many of whose words are in rows of words of an evaluation set."""

    def __init__(self, section: DecontaminateStep) -> None:
        self._section = section
        self._numbers: dict[str, int] = {}
        self._names = _names(section.files)
        texts: dict[int, list[tuple[list[str], int]]] = defaultdict(list)
        for number, file in enumerate(section.files):
            looked_for = 0
            for text in iter_texts(file, section.fields):
                words = _words(unicodedata.normalize("NFC", text))
                if len(words) >= section.min_words:
                    texts[min(len(words), section.ngram)].append((words, number))
                    looked_for += 1
            if not looked_for:
                raise ConfigError(f"{file}: none of its texts has {section.min_words} words. Lower `min_words`.")
        for words, _ in (text for found in texts.values() for text in found):
            for word in words:
                self._numbers.setdefault(word, len(self._numbers) + 1)
        self._mixed = _mixed(len(self._numbers) + 1)
        self._ngrams = {n: self._of_sets(n, found) for n, found in sorted(texts.items())}

    def __call__(self, document: Document, counts: Counter[str]) -> Document | Dropped:
        """The document, or why it is dropped; `counts` has, for each set, the documents that were dropped for it."""
        values = self._values(_words(document.text))
        covered = np.zeros(len(values) + 1, np.int64)
        sets: set[int] = set()
        for n, ngrams in self._ngrams.items():
            places, numbers = ngrams.places_in(_hashes(values, n))
            np.add.at(covered, places, 1)
            np.add.at(covered, places + n, -1)
            sets.update(numbers.tolist())
        if not sets or np.count_nonzero(np.cumsum(covered)) <= self._section.max_share * len(values):
            return document
        counts.update(f"in_{self._names[number]}" for number in sorted(sets))
        return Dropped("contaminated")

    def _of_sets(self, n: int, texts: list[tuple[list[str], int]]) -> _Ngrams:
        hashes = [_hashes(self._values(words), n) for words, _ in texts]
        numbers = np.repeat([number for _, number in texts], list(map(len, hashes)))
        distinct, first = np.unique(np.concatenate(hashes), return_index=True)
        bits = min(_MOST_BITS, (len(distinct) * _BITS_PER_NGRAM).bit_length())
        table = np.zeros(1 << bits, np.bool_)
        table[distinct >> np.uint64(64 - bits)] = True
        return _Ngrams(distinct, numbers[first], table, bits)

    def _values(self, words: list[str]) -> Hashes:
        """A number for each word; 0 is that of all words that no set has."""
        numbers = self._numbers
        return self._mixed[np.fromiter((numbers.get(word, 0) for word in words), np.int64, len(words))]


def _words(text: str) -> list[str]:
    return _WORDS.findall(text.lower())


def _hashes(values: Hashes, n: int) -> Hashes:
    """The hash of each n words in a row: a polynomial in one odd number, modulo 2 ** 64."""
    number = max(0, len(values) - n + 1)
    hashes = np.zeros(number, np.uint64)
    for offset in range(n):
        hashes = hashes * _BASE + values[offset : offset + number]
    return hashes


def _mixed(number: int) -> Hashes:
    """Numbers that look random, the same in every process: SplitMix64 (Steele et al. 2014) of 0, 1, 2, ..."""
    values = np.arange(1, number + 1, dtype=np.uint64) * _BASE
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _names(files: tuple[str, ...]) -> list[str]:
    """What sets are counted under: the names of their files, with the folders where two are the same."""
    names = [Path(file).name for file in files]
    return [name if names.count(name) == 1 else file for name, file in zip(names, files, strict=True)]
