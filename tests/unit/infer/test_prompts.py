import sysconfig
from pathlib import Path

import pytest

from llmtrain.data.tokenizer import SentencePieceTokenizer
from llmtrain.infer.text_stream import decode_with_names, encode_with_names
from tests.support.tokenizers import saved_tokenizer, train_sentencepiece


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> SentencePieceTokenizer:
    lines = Path(sysconfig.get_paths()["stdlib"], "ast.py").read_text("utf-8").splitlines(True)
    return saved_tokenizer(tmp_path_factory.mktemp("t") / "tokenizer.model", train_sentencepiece(lines, "bpe", 400))


def test_names_stand_for_their_tokens_and_the_text_around_them_is_text(tokenizer: SentencePieceTokenizer) -> None:
    first = tokenizer.vocab_size
    names = {"<extra_id_1>": first + 1, "<extra_id_10>": first + 10}
    text = "def f(<extra_id_10>):<extra_id_1><s>"
    ids = encode_with_names(text, tokenizer, names)
    expected = [*tokenizer.encode("def f("), first + 10, *tokenizer.encode("):"), first + 1, *tokenizer.encode("<s>")]
    assert ids == expected
    assert decode_with_names(ids, tokenizer, names) == text


def test_without_names_it_is_the_tokenizer(tokenizer: SentencePieceTokenizer) -> None:
    text = "return <mask>"
    assert encode_with_names(text, tokenizer, {}) == tokenizer.encode(text)
    assert decode_with_names(tokenizer.encode(text), tokenizer, {}) == text
