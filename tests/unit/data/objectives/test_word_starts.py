"""Where words begin, by the marks of each kind of tokenizer; which tokens no text gives."""

from pathlib import Path

import numpy as np
import pytest
import tokenizers

from data_pipelines.tokenizer import train_tokenizer
from llmtrain.data.row_config import load_pieces, word_begins
from llmtrain.data.tokenizer import load_tokenizer
from tests.unit.data.test_tokenizer import CORPUS, train_hugging_face


@pytest.mark.parametrize(
    ("style", "begin", "go_on"),
    [
        ("sentencepiece", ["▁the", "▁", "▁▁▁▁", "\n", "<0x0A>", "<0x09>"], ["the", ",", "Ġa", "<0x41>", "<0xC3>"]),
        ("byte_level", ["Ġthe", "Ċ", "ĊĊ", "ĉ", "Ġ"], ["the", "Ã", "▁a", ""]),
        ("wordpiece", ["the", ",", "▁", "Ġ"], ["##the", "##,"]),
    ],
)  # fmt: skip
def test_marks(style: str, begin: list[str], go_on: list[str]) -> None:
    assert word_begins([*begin, *go_on], style).tolist() == [True] * len(begin) + [False] * len(go_on)


def test_words_of_a_sentencepiece_model_are_words_of_the_text(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(CORPUS, tmp_path / "tokenizer.model", 360)
    table = load_pieces(tokenizer.path)
    text = "the tokenizer is é trained\n on text, with new\n\n    lines"
    ids = np.array(tokenizer.encode(text))
    bounds = np.flatnonzero(table.begins_word[ids])
    words = [tokenizer.decode(part.tolist()) for part in np.split(ids, bounds[bounds > 0])]
    assert "".join(words) == text
    assert [word.strip() for word in words if word.strip()] == text.split()
    assert np.flatnonzero(table.special).tolist() == list(range(7)), "pad, unk, bos, eos, mask, cls, sep"
    assert (tokenizer.mask_id, tokenizer.cls_id, tokenizer.sep_id) == (4, 5, 6)


def test_words_of_a_byte_level_tokenizer(tmp_path: Path) -> None:
    train_hugging_face(tmp_path / "tokenizer.json")
    tokenizer, table = load_tokenizer(tmp_path / "tokenizer.json"), load_pieces(tmp_path / "tokenizer.json")
    ids = np.array(tokenizer.encode("def x\n  return"))
    words = np.split(ids, np.flatnonzero(table.begins_word[ids]))
    assert [tokenizer.decode(word.tolist()).strip() for word in words if len(word)][:2] == ["def", "x"]
    assert np.flatnonzero(table.special).tolist() == [0, 1] and tokenizer.mask_id is None


def test_special_tokens_of_a_wordpiece_tokenizer(tmp_path: Path) -> None:
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {piece: number for number, piece in enumerate([*names, "play", "##ing", "the"])}
    model = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]"))
    model.add_special_tokens(names)
    model.save(str(tmp_path / "tokenizer.json"))
    tokenizer, table = load_tokenizer(tmp_path / "tokenizer.json"), load_pieces(tmp_path / "tokenizer.json")
    assert table.begins_word[5:].tolist() == [True, False, True]
    assert table.special.tolist() == [True] * 5 + [False] * 3
    assert [tokenizer.pad_id, tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id] == [0, 2, 3, 4]
    assert tokenizer.special_id("the") is None and tokenizer.special_id("[MASK]") == 4
