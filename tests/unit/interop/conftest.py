"""A tokenizer whose ids fit the tiny models, and little text to compare on."""

import sysconfig
from pathlib import Path

import pytest

from llmtrain.data.tokenizer import SentencePieceTokenizer
from llmtrain.interop import hf_export
from llmtrain.interop.proof import HARD_TEXTS
from tests.support.tokenizers import saved_tokenizer, train_sentencepiece
from tests.unit.interop.models import VOCAB_SIZE


@pytest.fixture(scope="session")
def small_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> SentencePieceTokenizer:
    text = Path(sysconfig.get_paths()["stdlib"], "argparse.py").read_text("utf-8").encode("ascii", "ignore").decode()
    letters = "".join(character for character in text if character in "abcdefghij \n")
    model = train_sentencepiece(letters.splitlines(True), "bpe", VOCAB_SIZE)
    return saved_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model", model)


@pytest.fixture(autouse=True)
def few_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A proof compares much text; where the text is not what is tested, some will do."""
    text = Path(sysconfig.get_paths()["stdlib"], "ast.py").read_text("utf-8")[:3000]
    monkeypatch.setattr(hf_export, "real_texts", lambda: [text, *HARD_TEXTS])
