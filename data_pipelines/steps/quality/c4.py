"""C4's rules (Raffel et al. 2020, section 2.2, and its code): lines go, and documents of which too little stays.

Not here: its list of bad words, which is a step of its own (`words`), and its deduplication of three sentences.
"""

import re
from collections import Counter

from data_pipelines.documents import Dropped
from data_pipelines.steps.quality.marks import num_sentences
from data_pipelines.steps.quality.split_text import SplitText
from llmtrain.config.pipelines.quality import C4Rules

_SENTENCE_ENDS = (".", "?", "!", '"', "'")
_ELLIPSIS = "..."
_CITATION = re.compile(r"\[(?:\d*|edit|citation needed)\]")
_LOREM_IPSUM = "lorem ipsum"
_JAVASCRIPT = "javascript"
_POLICIES = (
    *("terms of use", "privacy policy", "cookie policy"),
    *("uses cookies", "use of cookies", "use cookies"),
)


class C4Rule:
    """Keeps the lines that are sentences. Lines that go are counted under the name of the test that they failed."""

    def __init__(self, rules: C4Rules) -> None:
        self._rules = rules
        self._longest_word = float("inf") if rules.max_word_length is None else rules.max_word_length
        self._phrases = (
            *([_LOREM_IPSUM] if rules.lorem_ipsum else ()),
            *([_JAVASCRIPT] if rules.javascript else ()),
            *(_POLICIES if rules.policies else ()),
        )

    def __call__(self, words: SplitText, counts: Counter[str]) -> SplitText | Dropped:
        """The text of the lines that stay, or why it is dropped."""
        rules = self._rules
        lower = words.text.lower()
        # In most texts no line has any of the phrases; a citation that is taken out may join one.
        look = (rules.citations and "[" in words.text) or any(phrase in lower for phrase in self._phrases)
        kept: list[str] = []
        sentences, wanted = 0, rules.min_sentences or 0
        for line in words.lines:
            whole = line = line.strip()
            if len(line) > self._longest_word and max(map(len, line.split())) > self._longest_word:
                counts["c4_lines_too_long_word"] += 1
                continue
            if rules.citations and "[" in line:
                line = _CITATION.sub("", line)
            if rules.terminal_punctuation and (not line.endswith(_SENTENCE_ENDS) or line.endswith(_ELLIPSIS)):
                counts["c4_lines_no_terminal_punc"] += 1
                continue
            if rules.min_line_words and len(whole.split()) < rules.min_line_words:
                counts["c4_lines_too_few_words"] += 1
                continue
            verdict = self._of_phrases(line) if look else ""
            if verdict == "lorem_ipsum":
                return Dropped(verdict)
            if verdict == "javascript":
                counts["c4_lines_javascript"] += 1
                continue
            if rules.curly_brackets and "{" in line:
                return Dropped("curly_bracket")
            if verdict == "policy":
                counts["c4_lines_policy"] += 1
                continue
            if sentences < wanted:  # more need not be counted
                sentences += num_sentences(line)
            kept.append(line)
        if sentences < wanted:
            return Dropped("too_few_sentences")
        text = "\n".join(kept).strip()
        return words if text == words.text else SplitText(text)

    def _of_phrases(self, line: str) -> str:
        """The first of the tests for phrases that a line fails."""
        rules, lower = self._rules, line.lower()
        if rules.lorem_ipsum and _LOREM_IPSUM in lower:
            return "lorem_ipsum"
        if rules.javascript and _JAVASCRIPT in lower:
            return "javascript"
        return "policy" if rules.policies and any(phrase in lower for phrase in _POLICIES) else ""
