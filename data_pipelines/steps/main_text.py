"""The step `html`: the text of pages, without what surrounds it on every page of a site.

Paragraphs are apart by blank lines, code keeps its lines and blanks, lists their marks.
"""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

from data_pipelines.documents import Document, Dropped
from llmtrain.config.pipelines.steps import HtmlStep

_BEGINS_AS_PAGE = re.compile(
    r"[\s\ufeff]*<(?:!doctype\s+html|(?:html|head|body|title|meta|link|div|p|span|h[1-6]|ul|ol|dl|table|section|article|"
    r"header|main|nav|footer|center|font|pre|blockquote|form|a|b|i|em|strong|br|hr|img|script|style)(?=\s*/?>|\s[^<>=]*=[^<>]*>))",
    re.IGNORECASE,
)
_ROOT = re.compile(r"<html[\s>]", re.IGNORECASE)
_HEAD_CHARACTERS = 1024
_SURROGATES = re.compile("[\ud800-\udfff]")

_NESTED = re.compile(r"<(/?)(?:div|article)\b", re.IGNORECASE)
_DEEPEST = 500
"""How deep these may be nested: resiliparse goes up from each, so that pages of a few megabytes could take hours."""

_MOST_TAGS = 50_000
"""For trafilatura, which takes time that grows with the square of what it takes out: minutes at most."""


class MainText:
    """Puts the text of a page in the place of its HTML."""

    def __init__(self, section: HtmlStep) -> None:
        self._section = section
        self._extract = _extractor(section)
        self._most_tags = _MOST_TAGS if section.extractor == "trafilatura" else section.max_characters

    def __call__(self, document: Document, counts: Counter[str]) -> Document | Dropped:
        """The document with its text, or why it is dropped; `counts` has the number of pages."""
        html = document.text
        if not (_BEGINS_AS_PAGE.match(html) or _ROOT.search(html, 0, _HEAD_CHARACTERS)):
            return document
        if len(html) > self._section.max_characters or html.count("<") > self._most_tags:
            return Dropped("page_too_long")
        if _is_deeper(html, _DEEPEST):
            return Dropped("page_too_deep")
        text = self._extract(_SURROGATES.sub("\ufffd", html)).strip()
        if not text:
            return Dropped("page_without_text")
        counts["pages"] += 1
        return replace(document, text=text)


def _is_deeper(html: str, limit: int) -> bool:
    """Whether elements are nested deeper than the limit, by their tags alone: missing ends count as if there were none.

    So a page of more elements without ends is deep too.
    """
    depth = 0
    for found in _NESTED.finditer(html):
        depth = max(0, depth - 1) if found[1] else depth + 1
        if depth > limit:
            return True
    return False


def _extractor(section: HtmlStep) -> Callable[[str], str]:
    if section.extractor == "trafilatura":
        from trafilatura import extract

        return lambda html: extract(html, include_comments=False) or ""
    from resiliparse.extract.html2text import extract_plain_text  # pyright: ignore[reportMissingModuleSource]

    return lambda html: extract_plain_text(html, main_content=section.main_content, alt_texts=False)
