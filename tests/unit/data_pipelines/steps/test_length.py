"""Documents within bounds of length."""

from collections import Counter
from typing import Any

import pytest

from data_pipelines.documents import Document, Dropped
from data_pipelines.steps.length import Length
from llmtrain.config.pipelines.steps import LengthStep


@pytest.mark.parametrize(
    ("text", "keys", "reason"),
    [
        ("", {}, "too_short"),
        (" \n\t ", {}, "too_short"),
        ("a", {}, ""),
        (" abcd ", {"min_characters": 5}, "too_short"),
        (" abcde ", {"min_characters": 5}, ""),
        (" abcde ", {"max_characters": 5}, ""),
        ("abcdef", {"max_characters": 5}, "too_long"),
        ("a b", {"min_words": 3}, "too_few_words"),
        ("a   b   ", {"min_words": 3}, "too_few_words"),
        ("a b c", {"min_words": 3}, ""),
        ("ab\ncd", {"min_words": 3}, "too_few_words"),
        ("", {"min_characters": 0}, ""),
        ("", {"min_characters": 0, "min_words": 1}, "too_few_words"),
    ],
)
def test_both_sides_of_each_bound(text: str, keys: dict[str, Any], reason: str) -> None:
    document = Document("1", text)
    found = Length(LengthStep(**keys))(document, Counter())
    assert found == Dropped(reason) if reason else found is document
