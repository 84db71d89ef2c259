"""FineWeb's own rules (Penedo et al. 2024, section 3.6): how lines end, how long they are, which came before."""

from collections import Counter

from data_pipelines.documents import Dropped
from data_pipelines.steps.quality.marks import SENTENCE_ENDS
from data_pipelines.steps.quality.repetition import repeated
from data_pipelines.steps.quality.split_text import SplitText
from llmtrain.config.pipelines.quality import FineWebRules


class FineWebRule:
    """Shares of lines that end a sentence, that are short, and that came before; line ends per word."""

    def __init__(self, rules: FineWebRules) -> None:
        self._rules = rules

    def __call__(self, words: SplitText, counts: Counter[str]) -> SplitText | Dropped:
        """The same text, or why it is dropped."""
        reason = self._reason(words)
        return Dropped(reason) if reason else words

    def _reason(self, words: SplitText) -> str:
        rules, text = self._rules, words.text
        lines = [line for line in text.split("\n") if line and not line.isspace()]
        if not lines:
            return "empty"
        if rules.min_terminal_lines is not None:
            found = sum(line[-1] in SENTENCE_ENDS for line in lines)
            if found / len(lines) < rules.min_terminal_lines:
                return "line_punct_ratio"
        if rules.max_short_lines is not None and rules.short_line is not None:
            found = sum(length <= rules.short_line for length in map(len, lines))
            if found / len(lines) > rules.max_short_lines:
                return "short_line_ratio"
        line_ends = text.count("\n")
        if rules.max_duplicate_line_characters is not None:
            _, characters = repeated(lines)
            if characters / (len(text) - line_ends) > rules.max_duplicate_line_characters:
                return "char_dup_ratio"
        if rules.max_lines_per_word is not None and line_ends / len(words.words) > rules.max_lines_per_word:
            return "list_ratio"
        return ""
