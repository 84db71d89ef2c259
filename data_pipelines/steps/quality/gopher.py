"""Gopher's rules of quality (Rae et al. 2021, appendix A.1.1), in the reading of FineWeb (Penedo et al. 2024)."""

from collections import Counter

from data_pipelines.documents import Dropped
from data_pipelines.steps.quality.marks import MARKS
from data_pipelines.steps.quality.split_text import SplitText
from llmtrain.config.pipelines.quality import GopherRules

_BULLETS = ("•", "-")
_ELLIPSES = ("...", "…")


class GopherRule:
    """Number and length of words, symbols, bullets, ellipses, letters and stop words.

    Words are counted and measured where they are more than marks; shares are of all words.
    """

    def __init__(self, rules: GopherRules) -> None:
        self._rules = rules

    def __call__(self, words: SplitText, counts: Counter[str]) -> SplitText | Dropped:
        """The same text, or why it is dropped."""
        reason = self._of_lengths(words) or self._of_symbols(words) or self._of_kinds(words)
        return Dropped(reason) if reason else words

    def _of_lengths(self, words: SplitText) -> str:
        rules = self._rules
        places, others = words.others  # no mark is a letter
        counted = words.counts.copy()
        counted[places[list(map(MARKS.issuperset, others))]] = 0
        number = int(counted.sum())
        if rules.min_words is not None and number < rules.min_words:
            return "gopher_short_doc"
        if rules.max_words is not None and number > rules.max_words:
            return "gopher_long_doc"
        mean = int(counted @ words.lengths) / max(1, number)
        if rules.min_mean_word_length is not None and mean < rules.min_mean_word_length:
            return "gopher_below_avg_threshold"
        if rules.max_mean_word_length is not None and mean > rules.max_mean_word_length:
            return "gopher_above_avg_threshold"
        return ""

    def _of_symbols(self, words: SplitText) -> str:
        rules, text, lines = self._rules, words.text, max(1, len(words.lines))
        ellipses = sum(map(text.count, _ELLIPSES))
        if rules.max_symbols_per_word is not None:
            most = rules.max_symbols_per_word
            number = max(1, len(words.words))
            if text.count("#") / number > most:
                return "gopher_too_many_hashes"
            if ellipses / number > most:
                return "gopher_too_many_ellipsis"
        # Most texts have too few of either for these shares, wherever they stand.
        if rules.max_bullet_lines is not None and sum(map(text.count, _BULLETS)) / lines > rules.max_bullet_lines:
            found = sum(line.lstrip().startswith(_BULLETS) for line in words.lines)
            if found / lines > rules.max_bullet_lines:
                return "gopher_too_many_bullets"
        if rules.max_ellipsis_lines is not None and ellipses / lines > rules.max_ellipsis_lines:
            found = sum(line.rstrip().endswith(_ELLIPSES) for line in words.lines)
            if found / lines > rules.max_ellipsis_lines:
                return "gopher_too_many_end_ellipsis"
        return ""

    def _of_kinds(self, words: SplitText) -> str:
        rules, numbers = self._rules, words.numbers
        if rules.min_alphabetic_words is not None:
            places, others = words.others
            without = [not any(map(str.isalpha, word)) for word in others]
            number = len(words.words)
            if (number - int(words.counts[places[without]].sum())) / max(1, number) < rules.min_alphabetic_words:
                return "gopher_below_alpha_threshold"
        if rules.min_stop_words is not None:
            found = sum(word in numbers for word in set(rules.stop_words))
            if found < rules.min_stop_words:
                return "gopher_enough_stop_words"
        return ""
