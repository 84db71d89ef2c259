"""Bytes of tokens spell texts, with every kind of tokenizer; a guide lets nothing through that is no JSON."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.data.tokenizer import load_tokenizer
from llmtrain.errors import ConfigError
from llmtrain.infer.guides import LARGEST_SCHEMA, JsonGuides
from llmtrain.infer.token_bytes import token_bytes
from llmtrain.values.tokenizer import Tokenizer
from tests.support.hf_folders import write_bert, write_llama
from tests.support.tokenizers import saved_tokenizer, train_sentencepiece

LINES = [
    "the quick brown fox {} [] : , true false null 0 1 2",
    'a "name" of <0x41> \u00e4\u00f6 \u2581 \\ \n',
    "\t \r",
] * 40
KINDS = ("bpe", "unigram", "byte_level")
"""Kinds of tokenizers; the last one is a tokenizer.json."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokenizers")


@pytest.fixture(scope="module")
def built(folder: Path) -> dict[str, Tokenizer]:
    found: dict[str, Tokenizer] = {
        kind: saved_tokenizer(folder / f"{kind}.model", train_sentencepiece(LINES, kind, 320))
        for kind in ("bpe", "unigram")
    }
    return found | {"byte_level": load_tokenizer(write_llama(folder / "llama") / "tokenizer.json")}


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_of_tokens_spell_a_text(kind: str, built: dict[str, Tokenizer]) -> None:
    tokenizer = built[kind]
    spelled = token_bytes(tokenizer)
    assert len(spelled) == tokenizer.vocab_size and spelled[tokenizer.eos_id] == b""

    @settings(max_examples=200, deadline=None)
    @given(st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("\u2581 \n<0x41>"), max_size=40))
    def spells(text: str) -> None:
        assert b"".join(spelled[token] for token in tokenizer.encode(text)) == text.encode()

    spells()


def test_a_tokenizer_that_gives_no_text_back_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="do not spell a text byte by byte"):
        token_bytes(load_tokenizer(write_bert(tmp_path / "bert") / "tokenizer.json"))


SCHEMAS: dict[str, dict[str, Any]] = {
    "person": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 6},
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "kind": {"enum": ["cat", "dog", None]},
        },
        "required": ["name", "age", "kind"],
        "additionalProperties": False,
    },
    "numbers": {"type": "array", "items": {"enum": [1, 2.5, -3]}, "minItems": 2, "maxItems": 4},
    "either": {"anyOf": [{"type": "boolean"}, {"const": {"a": ["\u00e4"]}}]},
}


def judged(name: str, value: Any) -> bool:
    """Whether a value is of a schema, in Python's own words."""
    if name == "numbers":
        return isinstance(value, list) and 2 <= len(value) <= 4 and all(item in (1, 2.5, -3) for item in value)
    if name == "either":
        return isinstance(value, bool) or value == {"a": ["\u00e4"]}
    return (
        set(value) == {"name", "age", "kind"}
        and isinstance(value["name"], str) and len(value["name"]) <= 6
        and type(value["age"]) is int and 0 <= value["age"] <= 150
        and value["kind"] in ("cat", "dog", None)
    )  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SCHEMAS)
def test_whatever_is_chosen_of_what_may_follow_the_text_is_of_its_schema(
    kind: str, name: str, built: dict[str, Tokenizer]
) -> None:
    tokenizer = built[kind]
    vocabulary = tokenizer.vocab_size + 50  # rows that are no tokens, as in a model
    whole = JsonGuides(tokenizer, vocabulary, frozenset(tokenizer.end_ids)).of_schema(SCHEMAS[name])
    spelled, texts = token_bytes(tokenizer), set[str]()
    for seed in range(30):
        rng, guide, ids = random.Random(seed), whole.copy(), list[int]()
        while True:
            allowed = guide.allowed()
            assert len(allowed) == vocabulary and not allowed[tokenizer.vocab_size :].any()
            token = rng.choice(allowed.nonzero().flatten().tolist())
            assert guide.take(token)
            if token in tokenizer.end_ids:
                break
            ids.append(token)
        text = b"".join(spelled[token] for token in ids).decode()
        assert judged(name, json.loads(text)), text
        texts.add(text)
    assert len(texts) > 1, "copies of a guide go their own ways"


@pytest.mark.parametrize(
    ("schema", "told"),
    [
        ({"type": "person"}, "Invalid type"),
        ({"$ref": "http://127.0.0.1:9/x"}, "cannot be kept"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"oneOf": [{"type": "string"}, {"maxLength": 3}]}, "oneOf"),
        ({"enum": ["x" * LARGEST_SCHEMA]}, "100,000 are allowed"),
        ({"pattern": "("}, "cannot be kept"),
    ],
    ids=range(6),
)
def test_schemas_that_cannot_be_kept_are_refused(
    schema: dict[str, Any], told: str, built: dict[str, Tokenizer]
) -> None:
    tokenizer = built["byte_level"]
    with pytest.raises(ConfigError, match=told):
        JsonGuides(tokenizer, tokenizer.vocab_size, frozenset(tokenizer.end_ids)).of_schema(schema)
