"""Any text goes through every step: no exception, twice the same, and what went through once stays as it is."""

from collections import Counter
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.documents import Document, DocumentStep, Dropped
from data_pipelines.steps.table import STEPS
from llmtrain.config.pipelines.quality import QualityStep
from llmtrain.config.pipelines.steps import StepConfig

PARTS = (
    *(
        "the ",
        "of",
        "and ",
        "word",
        "Ünïcode ",
        "\n",
        "\n\n\n",
        "\r\n",
        "\t",
        "  ",
        ".",
        "...",
        "…",
        "•",
        "-",
        "#",
        "{",
        "[1]",
    ),
    *("lorem ipsum", "javascript", "use cookies", "<p>", "<html>", "</p>", "<div class=a>", "&amp;", "<!--", "a@b.com"),
    *("8.8.8.8", "2a00::1", "::", "+49 30 901820", "1.2.3.4", "\0", "\ud800", "\ufeff", "e\u0301", "\u0300", "\u2028"),
    *("[1]", "http://", "漢字", "。", "नमस्ते", "\U0001f600", "\ufdfa", "badword ", "one two three "),
)
TEXTS = st.lists(st.one_of(st.sampled_from(PARTS), st.text(max_size=20)), max_size=60).map("".join)
ALL_RULES = ("gopher", "gopher_repetition", "c4", "fineweb")


@cache
def steps() -> dict[str, DocumentStep]:
    folder = Path(mkdtemp())
    for name, text in {
        "words": "badword\none two\n<p>",
        "domains": "b.com",
        "set.txt": "one two three the of and word\n\nthe of and word",
    }.items():
        (folder / name).write_text(text)
    off = {
        name: {key: None for key, field in type(section).model_fields.items() if field.annotation is not bool}
        for name in ALL_RULES
        for section in [getattr(QualityStep(), name)]
    }
    off["gopher"].pop("stop_words")
    sections: dict[str, tuple[str, dict[str, Any]]] = {
        "normalize": ("normalize", {}),
        "normalize NFKD": ("normalize", {"form": "NFKD", "max_blank_lines": 0}),
        "normalize ftfy": ("normalize", {"ftfy": True}),
        "html": ("html", {}),
        "html trafilatura": ("html", {"extractor": "trafilatura"}),
        "language": ("language", {"min_probability": 0.0}),
        **{f"quality {name}": ("quality", {"rules": (name,)}) for name in ALL_RULES},
        "quality off": (
            "quality",
            {"rules": ALL_RULES, **off, "c4": {**off["c4"], "terminal_punctuation": False, "citations": False}},
        ),
        "length": ("length", {"min_words": 3}),
        "pii": ("pii", {}),
        "pii local": ("pii", {"public_only": False, "phone_regions": ("US", "IN")}),
        "words": ("words", {"files": (str(folder / "words"),), "max_count": 2, "max_share": 0.5}),
        "urls": ("urls", {"domains": (str(folder / "domains"),)}),
        "decontaminate": ("decontaminate", {"files": (str(folder / "set.txt"),), "ngram": 5, "min_words": 3}),
    }
    built = {}
    for key, (name, keys) in sections.items():
        section = StepConfig.model_validate({name: keys}).section
        built[key] = STEPS[name].build(section)
    return built


NAMES = (
    *("normalize", "normalize NFKD", "normalize ftfy", "html", "html trafilatura", "language", "length", "pii"),
    *(f"quality {name}" for name in (*ALL_RULES, "off")),
    *("pii local", "words", "urls", "decontaminate"),
)
NOT_IDEMPOTENT = {"normalize ftfy", "html", "html trafilatura", "quality c4"}
"""What ftfy mends may look damaged in another way, the text of a page may be a page, and a line without its citation
has fewer words.
"""


def test_every_step_is_tried() -> None:
    assert steps().keys() == set(NAMES)
    assert {name.split()[0] for name in NAMES} == STEPS.keys()


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=80)
@given(text=TEXTS)
def test_any_text_goes_through(name: str, text: str) -> None:
    step = steps()[name]
    document, counts, again = Document("1", text, url=text), Counter[str](), Counter[str]()
    found = step(document, counts)
    assert step(Document("1", text, url=text), again) == found
    assert again == counts
    assert document == Document("1", text, url=text)
    assert all(number > 0 and key.isprintable() for key, number in counts.items())
    if isinstance(found, Dropped):
        assert found.reason
        return
    assert (found is document) == (found == document)
    if name not in NOT_IDEMPOTENT:
        assert step(found, Counter()) == found
