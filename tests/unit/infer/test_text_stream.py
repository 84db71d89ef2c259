"""Text as it grows: all of it and nothing twice, whatever the tokens, and nothing behind a stop string."""

import random
import sysconfig
from pathlib import Path

import pytest

from llmtrain.data.tokenizer import load_tokenizer
from llmtrain.infer.text_stream import TextStream, decode_with_names, encode_with_names
from llmtrain.values.tokenizer import Tokenizer
from tests.support.hf_folders import write_llama
from tests.support.tokenizers import saved_tokenizer, train_sentencepiece

TEXTS = ("  def f(x):\n\treturn 'Grüße, 中文字 😀'\n\n", "a 😀 b", "\ufffd x \ufffd", " ", "😀")


@pytest.fixture(scope="module", params=["sentencepiece", "bytes"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    place = tmp_path_factory.mktemp("t")
    if request.param == "bytes":
        return load_tokenizer(write_llama(place / "hf") / "tokenizer.json")
    lines = Path(sysconfig.get_paths()["stdlib"], "ast.py").read_text("utf-8").splitlines(True)
    model = train_sentencepiece(lines, "bpe", 600, byte_fallback=True)
    return saved_tokenizer(place / "tokenizer.model", model)


def grown(tokenizer: Tokenizer, ids: list[int], names: dict[str, int], *stops: str) -> tuple[list[str], TextStream]:
    stream = TextStream(tokenizer, names, stops)
    return [*(stream.push(token) for token in ids), stream.end()], stream


def test_names_stand_for_their_tokens_and_the_text_around_them_is_text(tokenizer: Tokenizer) -> None:
    first = tokenizer.vocab_size
    names = {"<extra_id_1>": first + 1, "<extra_id_10>": first + 10}
    text = "def f(<extra_id_10>):<extra_id_1>x"
    ids = encode_with_names(text, tokenizer, names)
    expected = [*tokenizer.encode("def f("), first + 10, *tokenizer.encode("):"), first + 1, *tokenizer.encode("x")]
    assert ids == expected
    assert decode_with_names(ids, tokenizer, names) == text
    assert "".join(grown(tokenizer, ids, names)[0]) == text


def test_without_names_it_is_the_tokenizer(tokenizer: Tokenizer) -> None:
    text = "return <mask>"
    assert encode_with_names(text, tokenizer, {}) == tokenizer.encode(text)
    assert decode_with_names(tokenizer.encode(text), tokenizer, {}) == text


@pytest.mark.parametrize("text", TEXTS)
def test_the_pieces_are_the_text_and_none_ends_within_a_character(text: str, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(text)
    pieces, stream = grown(tokenizer, ids, {})
    assert "".join(pieces) == tokenizer.decode(ids) and not stream.stopped
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


def test_of_random_tokens_too(tokenizer: Tokenizer) -> None:
    rng = random.Random(0)
    names = {"<mask>": tokenizer.vocab_size}
    for _ in range(300):
        ids = [rng.randrange(tokenizer.vocab_size + (rng.random() < 0.3)) for _ in range(rng.randrange(50))]
        text = decode_with_names(ids, tokenizer, names)
        assert "".join(grown(tokenizer, ids, names)[0]) == text
        cut, stream = rng.randrange(len(ids) + 1), TextStream(tokenizer, names)
        assert stream.push(*ids[:cut]) + stream.push(*ids[cut:]) + stream.end() == text, "several at once"


def test_a_text_ends_before_the_first_stop_string_however_it_is_cut(tokenizer: Tokenizer) -> None:
    rng = random.Random(0)
    text = "the quick brown fox, the lazy dog; the end"
    ids = tokenizer.encode(text)
    whole = tokenizer.decode(ids)
    for _ in range(200):
        stops = [
            whole[(at := rng.randrange(len(whole))) : at + rng.randrange(1, 9)] for _ in range(rng.randrange(1, 4))
        ]
        stops.append("nowhere")
        pieces, stream = grown(tokenizer, ids, {}, *stops)
        assert stream.stopped
        ends = [(at + len(stop), at) for stop in stops if (at := whole.find(stop)) >= 0]
        assert "".join(pieces) == whole[: min(ends)[1]]


def test_what_only_looks_like_a_stop_string_comes_a_little_later(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a the end")
    pieces, stream = grown(tokenizer, ids, {}, "the end.", "")
    assert "".join(pieces) == tokenizer.decode(ids) and pieces[-1].endswith("the end") and not stream.stopped
