"""One spelling of what looks the same."""

import unicodedata
from collections import Counter
from typing import Any

import pytest

from data_pipelines.documents import Document
from data_pipelines.steps.normalization import Normalization
from llmtrain.config.pipelines.steps import NormalizeStep


def normalized(text: str, counts: Counter[str] | None = None, **keys: Any) -> str:
    found = Normalization(NormalizeStep(**keys))(Document("1", text), counts if counts is not None else Counter())
    assert isinstance(found, Document)
    return found.text


@pytest.mark.parametrize(
    ("text", "expected", "counted"),
    [
        ("e\u0301te\u0301", "\u00e9t\u00e9", {"unicode_form"}),
        ("e\0\u0301", "\u00e9", {"control_characters", "unicode_form"}),  # what was apart comes together
        ("a\r\nb\rc\x0bd\x0ce\x85f\u2028g\u2029h", "a\nb\nc\nd\ne\nf\ng\nh", {"other_line_ends"}),
        ("\ufeffa\0b\x1bc\x7fd\x9fe\ud800f\uffffg\U0010fffeh\ufdd0", "abcdefgh", {"control_characters"}),
        ("a \t\n  b\u00a0\n", "a\n  b", {"trailing_space", "blank_lines"}),
        ("\n\n\n  a\n\n\n\nb\n\nc\n\n", "  a\n\nb\n\nc", {"blank_lines"}),
        ("a\tb\n\n  c", "a\tb\n\n  c", set()),
        ("\u200d\u200c\u00ad\ue000", "\u200d\u200c\u00ad\ue000", set()),  # joiners and private characters are text
        ("", "", set()),
    ],
)
def test_what_is_mended_is_counted(text: str, expected: str, counted: set[str]) -> None:
    counts = Counter[str]()
    assert normalized(text, counts) == expected
    assert set(counts) == counted
    assert set(counts.values()) <= {1}


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"form": None}, "e\u0301\u00b2\n\nb"),
        ({"form": "NFKC"}, "\u00e92\n\nb"),
        ({"form": "NFD"}, "e\u0301\u00b2\n\nb"),
        ({"control_characters": False}, "\u00e9\u00b2\0\n\nb"),
        ({"trailing_space": False}, "\u00e9\u00b2  \n\nb"),
        ({"max_blank_lines": 0}, "\u00e9\u00b2\nb"),
        ({"max_blank_lines": 2}, "\u00e9\u00b2\n\n\nb"),
        ({"max_blank_lines": None}, "\u00e9\u00b2\n\n\n\nb\n"),
    ],
)
def test_each_part_can_be_left_out(keys: dict[str, Any], expected: str) -> None:
    assert normalized("e\u0301\u00b2\0  \n\n\n\nb\n", **keys) == expected


def test_ftfy_mends_what_was_decoded_wrongly() -> None:
    pytest.importorskip("ftfy")
    counts = Counter[str]()
    assert normalized("schÃ¶n â€“ “so” &amp; ﬁne", counts, ftfy=True) == "schön – “so” &amp; ﬁne"
    assert counts["mended_decoding"] == 1
    assert normalized("schÃ¶n") == "schÃ¶n"


@pytest.mark.parametrize("mark", ["\u0300\u0323", "\u0f73", "\u0344", "\uff9e\u0323"])
def test_marks_in_a_row_take_no_time(mark: str) -> None:
    """Python sorts marks in time that grows with the square of their number: this would take minutes."""
    text = "a" + mark * 100_000
    counts = Counter[str]()
    found = normalized(text, counts)
    assert counts["combining_marks"] == 1
    assert normalized(found) == found
    few = "a" + mark * 100
    assert normalized(few) == unicodedata.normalize("NFC", few)


def test_an_untouched_document_is_the_same_object() -> None:
    document = Document("1", "Füße\n\n  über")
    assert Normalization(NormalizeStep())(document, Counter()) is document
