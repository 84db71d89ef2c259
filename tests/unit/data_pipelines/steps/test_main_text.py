"""The text of pages."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from data_pipelines.documents import Document, Dropped
from data_pipelines.steps.main_text import MainText
from llmtrain.config.pipelines.steps import HtmlStep

PARAGRAPHS = [
    f"{first} The committee met on Thursday, and it was decided that the old bridge should be closed for the winter, "
    "as it had been in the years before; nobody who was asked had anything to say against it."
    for first in ("First.", "Second.", "Third.")
]
CODE = "def f(x):\n    if x:\n        return 1\n    return 2"
PAGE = f"""<!DOCTYPE html>
<html lang="de"><head><title>The title</title><style>p {{ color: red }}</style><script>var hidden = 1;</script></head>
<body><nav><ul><li><a href="/">Home</a></li><li><a href="/about">About us</a></li></ul></nav>
<main><article><h1>The bridge</h1>{"".join(f"<p>{text}</p>" for text in PARAGRAPHS)}
<pre><code>{CODE}</code></pre><p>&lt;b&gt; &amp; &eacute;t&eacute;</p></article></main>
<footer class="footer">Copyright by nobody</footer></body></html>"""

extractors = pytest.mark.parametrize("extractor", ["resiliparse", "trafilatura"])


def outcome(text: str, counts: Counter[str] | None = None, **keys: Any) -> Document | Dropped:
    return MainText(HtmlStep(**keys))(Document("1", text, url="u"), counts if counts is not None else Counter())


@extractors
def test_the_main_text_is_what_is_left(extractor: str) -> None:
    counts = Counter[str]()
    found = outcome(PAGE, counts, extractor=extractor)
    assert isinstance(found, Document)
    assert found.url == "u" and counts == {"pages": 1}
    for paragraph in PARAGRAPHS:
        assert paragraph in found.text.split("\n")
    assert CODE in found.text
    assert "<b> & été" in found.text
    for other in ("About us", "hidden", "color", "Copyright", "<p>"):
        assert other not in found.text


def test_all_text_on_request() -> None:
    found = outcome(PAGE, main_content=False)
    assert isinstance(found, Document)
    assert "About us" in found.text and "Copyright" in found.text and "hidden" not in found.text


@pytest.mark.parametrize(
    "text",
    ["", "plain", "a < b and c > d", "<a few words", "a line\n<p>about a tag", "<b is a variable>", "<xml><a/></xml>"],
)
def test_what_is_no_page_stays(text: str) -> None:
    counts = Counter[str]()
    document = Document("1", text)
    assert MainText(HtmlStep())(document, counts) is document
    assert not counts


@pytest.mark.parametrize(
    "text",
    [
        "<p>Some text</p>",
        "\ufeff \n<HTML><body>Some text",
        '<div class="x">Some text</div>',
        "<?xml version='1.0' encoding='utf-16'?><!-- a --><html xmlns='x'><body>Some text</body></html>",
        "Warning: something in line 1\n<html><body>Some text</body></html>",
        "<body>Some\0 text\ud800</body>",
    ],
)
def test_pages_and_parts_of_them(text: str) -> None:
    found = outcome(text, main_content=False)
    assert isinstance(found, Document)
    assert "Some" in found.text and "text" in found.text and "<" not in found.text


@extractors
@pytest.mark.parametrize("text", ["<html></html>", "<html><body><script>x = 1</script></body></html>", "<p></p>"])
def test_a_page_without_text_is_dropped(extractor: str, text: str) -> None:
    assert outcome(text, extractor=extractor) == Dropped("page_without_text")


@extractors
@pytest.mark.parametrize("tag", ["div", "article", "DIV class=x"])
def test_pages_that_are_nested_too_deep_are_dropped(extractor: str, tag: str) -> None:
    """A million of them take resiliparse hours; trafilatura gets no page of so many tags anyway."""
    number = 1_000_000 if extractor == "resiliparse" else 40_000
    assert outcome("<html>" + f"<{tag}>" * number + "x", extractor=extractor) == Dropped("page_too_deep")
    flat = outcome("<html><body>" + f"<{tag}>Some text</{tag.split()[0]}>" * 2000)
    assert isinstance(flat, Document)


@extractors
@pytest.mark.parametrize("part", ["<b>", "<ul><li>", "<table><tr><td>", "<p ", "<a ", "<", "&amp", "<!--", "<font><p>"])
def test_hostile_pages_end(extractor: str, part: str) -> None:
    """Each would take minutes or more, did it take time that grows with the square of its length."""
    outcome("<html><body><p>x</p>" + part * (60_000 // len(part)), extractor=extractor)


@pytest.mark.parametrize("part", ["a=", "=", "a ", " ", "\n", "\ufeff"])
def test_the_begin_of_a_text_is_looked_at_once(part: str) -> None:
    for begin in ("<p ", "<p", "", "<"):
        document = Document("1", begin + part * (2_000_000 // len(part)))
        assert MainText(HtmlStep())(document, Counter()) is document


def test_a_page_that_is_too_long_is_dropped() -> None:
    page = "<p>" + "x" * 97
    assert isinstance(outcome(page, max_characters=100), Document)
    assert outcome(page, max_characters=99) == Dropped("page_too_long")
    assert isinstance(outcome("x" * 200, max_characters=100), Document)


def test_trafilatura_gets_no_page_of_very_many_tags() -> None:
    page = "<p class=comment>x" * 60_000
    assert outcome(page, extractor="trafilatura") == Dropped("page_too_long")
    assert isinstance(outcome(page), Document)


DOCUMENTATION = Path("/usr/share/doc/libffi8/html/Closure-Example.html")


@pytest.mark.skipif(not DOCUMENTATION.exists(), reason=f"{DOCUMENTATION} is not installed")
@extractors
def test_a_real_page_keeps_its_code(extractor: str) -> None:
    found = outcome(DOCUMENTATION.read_text(), extractor=extractor)
    assert isinstance(found, Document)
    assert "  if (closure)\n    {\n      /* Initialize the argument info vectors */\n" in found.text
