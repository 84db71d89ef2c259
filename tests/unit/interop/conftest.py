"""A tokenizer whose ids fit the tiny models."""

import sysconfig
from pathlib import Path

import pytest

from llmtrain.data.tokenizer import SentencePieceTokenizer
from tests.support.tokenizers import saved_tokenizer, train_sentencepiece
from tests.unit.interop.models import VOCAB_SIZE


@pytest.fixture(scope="session")
def small_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> SentencePieceTokenizer:
    text = Path(sysconfig.get_paths()["stdlib"], "argparse.py").read_text("utf-8").encode("ascii", "ignore").decode()
    letters = "".join(character for character in text if character in "abcdefghij \n")
    model = train_sentencepiece(letters.splitlines(True), "bpe", VOCAB_SIZE)
    return saved_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model", model)
