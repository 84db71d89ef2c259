"""The step `normalize`: one spelling of what looks the same.

Every part takes time in proportion to the text, whatever is in it.
"""

import re
import unicodedata
from collections import Counter
from dataclasses import replace
from functools import cache

from data_pipelines.documents import Document, Dropped
from llmtrain.config.pipelines.steps import NormalizeStep

_OTHER_LINE_ENDS = ("\r\n", *"\r\v\f\x1c\x1d\x1e\x85\u2028\u2029")
"""What Python, Unicode (UAX #14) and old machines end lines with, and form feeds, which end pages."""

_CONTROLS = re.compile(
    "[\x00-\x08\x0e-\x1f\x7f-\x9f\ufeff\ud800-\udfff\ufdd0-\ufdef"
    + "".join(chr(plane << 16 | last) for plane in range(17) for last in (0xFFFE, 0xFFFF))
    + "]"
)
"""Control characters, byte order marks, surrogates, which no UTF-8 can hold, and code points that are no characters."""

_PLAIN = re.compile("[\n\t -~]*")

_MANY_MARKS = 500
_STREAM_SAFE = 30
_JOINER = "\u034f"


class Normalization:
    """Mends, in this order: wrong decoding, line ends, control characters, Unicode form, white space."""

    def __init__(self, section: NormalizeStep) -> None:
        self._section = section
        self._fix = None
        if section.ftfy:
            from ftfy import TextFixerConfig, fix_text

            # What the other parts do is left to them; quotes and ligatures are spelling, not damage.
            config = TextFixerConfig(
                unescape_html=False, uncurl_quotes=False, fix_latin_ligatures=False, fix_character_width=False,
                fix_line_breaks=False, remove_control_chars=False, normalization=None, explain=False,
            )  # fmt: skip
            self._fix = lambda text: fix_text(text, config)
        blank_lines = section.max_blank_lines
        self._too_many = None if blank_lines is None else re.compile(f"\n{{{blank_lines + 2},}}")
        self._line_ends = "\n" * ((blank_lines or 0) + 1)

    def __call__(self, document: Document, counts: Counter[str]) -> Document | Dropped:
        """The document; `counts` says how many have had a part mended."""
        section, text = self._section, document.text
        if self._fix:
            text = _counted(counts, "mended_decoding", text, self._fix(text))
        if not _PLAIN.fullmatch(text):
            plain = text
            for line_end in _OTHER_LINE_ENDS:  # many times as fast as a pattern
                plain = plain.replace(line_end, "\n")
            text = _counted(counts, "other_line_ends", text, plain)
            if section.control_characters:
                text = _counted(counts, "control_characters", text, _CONTROLS.sub("", text))
            if section.form:
                # Python sorts marks in time that grows with the square of their number: megabytes of them take days.
                text = _counted(counts, "combining_marks", text, _stream_safe(text))
                text = _counted(counts, "unicode_form", text, unicodedata.normalize(section.form, text))
        if section.trailing_space:
            text = _counted(counts, "trailing_space", text, "\n".join(map(str.rstrip, text.split("\n"))))
        if self._too_many:
            fewer = self._too_many.sub(self._line_ends, text).strip("\n")
            text = _counted(counts, "blank_lines", text, fewer)
        return document if text is document.text else replace(document, text=text)


@cache
def _marks() -> tuple[frozenset[str], re.Pattern[str]]:
    """The marks that combine with a letter, and more of them in a row than any text has.

    The planes above have none.
    """
    characters = map(chr, range(0x300, 0x20000))
    marks = [mark for mark in characters if unicodedata.combining(unicodedata.normalize("NFKD", mark)[0])]
    return frozenset(marks), re.compile(f"[{''.join(map(re.escape, marks))}]{{{2 * _MANY_MARKS},}}")


def _stream_safe(text: str) -> str:
    """The text with a joiner behind every 30 marks, where there are too many in a row (UAX #15, D4)."""
    marks, in_a_row = _marks()
    blocks = range(0, len(text) - _MANY_MARKS + 1, _MANY_MARKS)
    if not any(marks.issuperset(text[begin : begin + _MANY_MARKS]) for begin in blocks):
        return text
    return in_a_row.sub(
        lambda found: _JOINER.join(found[0][n : n + _STREAM_SAFE] for n in range(0, len(found[0]), _STREAM_SAFE)), text
    )


def _counted(counts: Counter[str], name: str, before: str, after: str) -> str:
    """The text afterwards: the same object where nothing changed, else counted."""
    if after == before:
        return before
    counts[name] += 1
    return after
