"""Documents with text of evaluation sets in them."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from data_pipelines.documents import Document, Dropped
from data_pipelines.steps.contamination import Contamination
from llmtrain.config.pipelines.steps import DecontaminateStep
from llmtrain.errors import ConfigError
from tests.support.real_text import real_documents
from tests.unit.data_pipelines.steps.borderline import words

QUESTION = words(20, 6, "q")
SHORT = words(9, 6, "s")
OTHER = words(300, 6, "t")


def step(folder: Path, **keys: Any) -> Contamination:
    sets = {"exam.jsonl": [" ".join(QUESTION), "too short"], "quiz.jsonl": [" ".join(SHORT), " ".join(QUESTION[:15])]}
    for name, texts in sets.items():
        (folder / name).write_text("\n".join(json.dumps({"question": text}) for text in texts))
    return Contamination(DecontaminateStep(files=tuple(str(folder / name) for name in sets), **keys))


def among_others(some: list[str]) -> str:
    return " ".join([*OTHER[:100], *some, *OTHER[100:]])


@pytest.mark.parametrize(
    ("some", "sets"),
    [
        (QUESTION, ["exam.jsonl"]),
        (QUESTION[:13], ["exam.jsonl"]),
        (QUESTION[7:], ["exam.jsonl"]),
        (QUESTION[:12], []),
        (QUESTION[8:], []),
        ([*QUESTION[:6], "x", *QUESTION[6:13]], []),
        (SHORT, ["quiz.jsonl"]),
        (SHORT[:8], []),
        ([*QUESTION, *SHORT], ["exam.jsonl", "quiz.jsonl"]),
        (["too", "short"], []),
    ],
)
def test_thirteen_words_in_a_row_or_a_whole_text(tmp_path: Path, some: list[str], sets: list[str]) -> None:
    counts = Counter[str]()
    document = Document("1", among_others(some))
    found = step(tmp_path)(document, counts)
    assert found == (Dropped("contaminated") if sets else document)
    assert counts == {f"in_{name}": 1 for name in sets}


def test_capitals_and_marks_do_not_count(tmp_path: Path) -> None:
    text = among_others([f"{word.upper()}, --\n" for word in QUESTION])
    assert step(tmp_path)(Document("1", text), Counter()) == Dropped("contaminated")


def test_words_need_to_be_as_in_the_set(tmp_path: Path) -> None:
    text = among_others([f"{word}s" for word in QUESTION])
    assert step(tmp_path)(Document("1", text), Counter()) == Document("1", text)


@pytest.mark.parametrize(("max_share", "dropped"), [(0.0, True), (20 / 320 - 1e-9, True), (20 / 320, False)])
def test_the_share_of_words_that_may_match(tmp_path: Path, max_share: float, dropped: bool) -> None:
    document = Document("1", among_others(QUESTION))
    found = step(tmp_path, max_share=max_share)(document, Counter())
    assert found == (Dropped("contaminated") if dropped else document)


def test_other_lengths(tmp_path: Path) -> None:
    document = Document("1", among_others(QUESTION[3:8]))
    assert step(tmp_path, ngram=5, min_words=5)(document, Counter()) == Dropped("contaminated")
    assert step(tmp_path, ngram=6, min_words=5)(document, Counter()) is document


@pytest.mark.parametrize("text", ["", "word", " ".join(OTHER[:5])])
def test_short_documents(tmp_path: Path, text: str) -> None:
    document = Document("1", text)
    assert step(tmp_path)(document, Counter()) is document


def test_a_set_of_which_nothing_is_looked_for_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "set.txt"
    path.write_text("Some words.\n\nAnd some more.")
    with pytest.raises(ConfigError, match=r"set\.txt: none of its texts has 8 words\. Lower `min_words`\."):
        Contamination(DecontaminateStep(files=(str(path),)))


def test_real_documents_are_found_where_looking_word_by_word_finds_them(tmp_path: Path) -> None:
    texts = real_documents(120)
    cut = [" ".join(text.split()[100:180]) for text in texts[::6]]
    path = tmp_path / "set.jsonl"
    path.write_text("\n".join(json.dumps(text) for text in cut if len(text.split()) >= 20))
    found = Contamination(DecontaminateStep(files=(str(path),)))

    def ngrams(text: str) -> set[tuple[str, ...]]:
        parts = re.findall(r"\w+", text.lower())
        return {tuple(parts[n : n + 13]) for n in range(len(parts) - 12)}

    wanted = set().union(*map(ngrams, cut))
    dropped = [isinstance(found(Document("1", text), Counter()), Dropped) for text in texts]
    assert dropped == [not wanted.isdisjoint(ngrams(text)) for text in texts]
    assert 20 <= sum(dropped) < len(texts)


def test_hashes_are_those_of_the_formula_in_every_process(tmp_path: Path) -> None:
    def mixed(number: int) -> int:
        value = (number + 1) * 0x9E3779B97F4A7C15 % 2**64
        value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        value = (value ^ (value >> 27)) * 0x94D049BB133111EB % 2**64
        return value ^ (value >> 31)

    expected = 0
    for number in range(1 + len(QUESTION), 1 + len(QUESTION) + len(SHORT)):  # words by their first places
        expected = (expected * 0x9E3779B97F4A7C15 + mixed(number)) % 2**64
    assert step(tmp_path)._ngrams[len(SHORT)].hashes.tolist() == [expected]
