"""Documents with words of a list."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from data_pipelines.documents import Document, Dropped
from data_pipelines.steps.word_list import WordList
from llmtrain.config.pipelines.steps import WordsStep


def step(folder: Path, **keys: Any) -> WordList:
    path = folder / "words.txt"
    path.write_text("# of no use\nDarn\nblue  Whistle\na$$\nübel\n2 many words\n", encoding="utf-8")
    return WordList(WordsStep(files=(str(path),), **keys))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("What a darn thing, DARN!", 2),
        ("darning and undarn", 0),
        ("darn-it (darn) 'darn' darn_it", 3),  # an underscore is part of a word
        ("a blue\n  whistle; blue-whistle; blue whistles", 1),
        ("you a$$. a $$ b$ a$", 2),
        ("ÜBEL", 1),
        ("a 2 2 many words", 1),
        ("", 0),
    ],
)
def test_what_is_found(tmp_path: Path, text: str, found: int) -> None:
    counts = Counter[str]()
    document = Document("1", text)
    assert step(tmp_path, max_count=100)(document, counts) is document
    assert counts["listed_words"] == found


@pytest.mark.parametrize(
    ("keys", "number", "reason"),
    [
        ({}, 0, ""),
        ({}, 1, "listed_words"),
        ({"max_count": 2}, 2, ""),
        ({"max_count": 2}, 3, "listed_words"),
        ({"max_count": None, "max_share": 0.1}, 10, ""),
        ({"max_count": None, "max_share": 0.1}, 11, "listed_share"),
        ({"max_count": 20, "max_share": 0.1}, 21, "listed_words"),
    ],
)
def test_both_sides_of_each_limit(tmp_path: Path, keys: dict[str, Any], number: int, reason: str) -> None:
    text = " ".join(["darn"] * number + ["good"] * (100 - number))
    found = step(tmp_path, **keys)(Document("1", text), Counter())
    assert found == (Dropped(reason) if reason else Document("1", text))
