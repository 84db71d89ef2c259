"""Gopher's rules of repetition (Rae et al. 2021, appendix A.1.1 and table A1).

An n-gram that occurs again begins with an (n-1)-gram that occurs again. So n-grams are numbered by the number of the
(n-1)-gram that they begin with and their last word, and only those that occur again are looked at for the next n:
exact, with no strings made, and soon over for most texts. N words; K places, fewer from n to n.
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np

from data_pipelines.documents import Dropped
from data_pipelines.steps.quality.split_text import Numbers, SplitText
from llmtrain.config.pipelines.quality import RepetitionRules

_SORTED_BITS = 62


@dataclass(frozen=True)
class _Repeated:
    """N-grams of one n that occur more than once: `places` [K], by number and then by place, and their `numbers` [K].

    `begins` [G]: where each number begins in them; `counts` [G]: how often it occurs.
    """

    places: Numbers
    numbers: Numbers
    begins: Numbers
    counts: Numbers


class RepetitionRule:
    """Lines, paragraphs and n-grams of words that come again and again."""

    def __init__(self, rules: RepetitionRules) -> None:
        self._rules = rules
        self._top = (rules.max_top_2gram, rules.max_top_3gram, rules.max_top_4gram)
        self._again = (
            *(rules.max_duplicate_5grams, rules.max_duplicate_6grams, rules.max_duplicate_7grams),
            *(rules.max_duplicate_8grams, rules.max_duplicate_9grams, rules.max_duplicate_10grams),
        )

    def __call__(self, words: SplitText, counts: Counter[str]) -> SplitText | Dropped:
        """The same text, or why it is dropped."""
        if not words.text:
            return Dropped("empty")
        reason = self._of_paragraphs(words.text) or self._of_lines(words.text) or self._of_ngrams(words)
        return Dropped(reason) if reason else words

    def _of_paragraphs(self, text: str) -> str:
        rules = self._rules
        paragraphs = [part for part in text.strip().split("\n\n") if part]
        if "\n\n\n" in text:
            paragraphs = [inner for part in paragraphs if (inner := part.strip("\n"))]
        again, characters = repeated(paragraphs)
        if _exceeds(again / max(1, len(paragraphs)), rules.max_duplicate_paragraphs):
            return "dup_para_frac"
        if _exceeds(characters / len(text), rules.max_duplicate_paragraph_characters):
            return "dup_para_char_frac"
        return ""

    def _of_lines(self, text: str) -> str:
        rules = self._rules
        lines = [line for line in text.split("\n") if line]
        lines += [""] * (text.startswith("\n") + text.endswith("\n"))  # as if line ends in a row were one
        again, characters = repeated(lines)
        if _exceeds(again / len(lines), rules.max_duplicate_lines):
            return "dup_line_frac"
        if _exceeds(characters / len(text), rules.max_duplicate_line_characters):
            return "dup_line_char_frac"
        return ""

    def _of_ngrams(self, words: SplitText) -> str:
        size, ids = len(words.text), words.ids
        places = np.flatnonzero(words.counts[ids] > 1)
        # Words in the order of their places, which is enough to begin with.
        found = _Repeated(places, ids[places], places[:0], places[:0])
        ends = np.zeros(len(ids) + 1, np.int64)
        np.cumsum(words.lengths[ids], out=ends[1:])  # [N + 1]: characters of the first words
        for n, limit in enumerate(self._top, 2):
            found = _repeated_ngrams(words, found, n)
            if limit is not None and _top_characters(ends, found, n) / size > limit:
                return f"top_{n}_gram"
        for n, limit in enumerate(self._again, 5):
            found = _repeated_ngrams(words, found, n)
            if not len(found.places):
                return ""
            if limit is None:
                continue
            again = np.ones(len(found.places), np.bool_)
            again[found.begins] = False
            again = found.places[again]
            if int((ends[again + n] - ends[again]).sum()) / size <= limit:  # those that overlap counted fully
                continue
            if _characters_in_turn(ends, found, n) / size > limit:
                return f"duplicated_{n}_n_grams"
        return ""


def repeated(parts: list[str]) -> tuple[int, int]:
    """How many of some texts came before, and the characters of those."""
    distinct = set(parts)
    again = len(parts) - len(distinct)
    return again, sum(map(len, parts)) - sum(map(len, distinct)) if again else 0


def _exceeds(share: float, limit: float | None) -> bool:
    return limit is not None and share > limit


def _repeated_ngrams(words: SplitText, before: _Repeated, n: int) -> _Repeated:
    """The n-grams that occur again, from those of n - 1."""
    ids, bits = words.ids, len(words.ids).bit_length()
    inside = before.places <= len(ids) - n
    places = before.places[inside]
    keys = before.numbers[inside] * len(words.numbers) + ids[places + n - 1]
    if len(keys) and int(keys.max()).bit_length() + bits <= _SORTED_BITS:
        # Sorting numbers is several times faster than sorting places by them.
        packed = np.sort(keys << bits | places)
        keys, places = packed >> bits, packed & ((1 << bits) - 1)
    else:
        order = np.lexsort((places, keys))
        keys, places = keys[order], places[order]
    is_new = np.ones(len(keys) + 1, np.bool_)
    np.not_equal(keys[1:], keys[:-1], out=is_new[1:-1])
    begins = np.flatnonzero(is_new)  # one more, behind the last key
    counts = begins[1:] - begins[:-1]
    again = counts > 1
    places, counts = places[np.repeat(again, counts)], counts[again]
    return _Repeated(places, np.repeat(np.arange(len(counts)), counts), np.cumsum(counts) - counts, counts)


def _top_characters(ends: Numbers, found: _Repeated, n: int) -> int:
    """Characters of the most frequent n-gram in all its places, blanks between its words included.

    Of several, the first counts; where none occurs again, that is the text's first.
    """
    if len(ends) <= n:
        return 0
    times, first = 1, 0
    if len(found.places):
        times = int(found.counts.max())
        first = int(found.places[found.begins[found.counts == times]].min())
    return (int(ends[first + n] - ends[first]) + n - 1) * times


def _characters_in_turn(ends: Numbers, found: _Repeated, n: int) -> int:
    """Characters of n-grams that came before, read from left to right: behind one, the next begins where it ends."""
    order = np.argsort(found.places)
    seen: set[int] = set()
    characters = begin = 0
    for place, number in zip(found.places[order].tolist(), found.numbers[order].tolist(), strict=True):
        if place < begin:
            continue
        if number in seen:
            characters += int(ends[place + n] - ends[place])
            begin = place + n
        else:
            seen.add(number)
    return characters
