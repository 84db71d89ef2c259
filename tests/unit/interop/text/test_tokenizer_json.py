"""A converted tokenizer gives the ids and the text that sentencepiece gives."""

import json
import random
import sysconfig
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2 as sentencepiece_model
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from data_pipelines.tokenizer import with_rounded_scores
from llmtrain.data.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer
from llmtrain.errors import ExportError
from llmtrain.interop.proof import HARD_TEXTS
from llmtrain.interop.text.special_tokens import named_tokens
from llmtrain.interop.text.tokenizer_json import TokenizerSettings, convert, write_tokenizer
from tests.support.tokenizers import saved_tokenizer, train_sentencepiece

KINDS = ("bpe", "unigram")
SOURCES = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
REPEATED = "The conflicts of merges lie in runs: aaaa abab ==== ---- "


def _trained(kind: str, lines: list[str], vocab_size: int) -> bytes:
    model = train_sentencepiece(lines, kind, vocab_size)
    return with_rounded_scores(model) if kind == "unigram" else model


@pytest.fixture(scope="module", params=KINDS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """A tokenizer trained on every fifth source, and what transformers loads from its export."""
    folder = tmp_path_factory.mktemp(request.param)
    texts = [path.read_text("utf-8", "replace") for path in SOURCES[::12]]
    model = _trained(request.param, [line for text in texts for line in text.splitlines(True)], 1500)
    tokenizer = saved_tokenizer(folder / "tokenizer.model", model)
    write_tokenizer(folder, tokenizer, named_tokens(tokenizer), TokenizerSettings(64))
    return tokenizer, AutoTokenizer.from_pretrained(folder, local_files_only=True)


def _assert_equal(tokenizer: SentencePieceTokenizer, exported, text: str) -> None:
    ids = tokenizer.encode(text)
    assert exported.encode(text, split_special_tokens=True) == ids
    if not any(name in text for name in exported.all_special_tokens):
        assert exported(text)["input_ids"] == ids, "as a user calls it"
    assert exported.decode(ids) == tokenizer.decode(ids)


def test_ids_and_text_agree_on_the_standard_library(pair):
    tokenizer, exported = pair
    for path in SOURCES[1::4]:
        _assert_equal(tokenizer, exported, path.read_text("utf-8", "replace"))


@pytest.mark.parametrize("text", HARD_TEXTS, ids=[repr(text[:12]) for text in HARD_TEXTS])
def test_ids_and_text_agree_on_hard_texts(pair, text):
    _assert_equal(*pair, text)


fragments = st.sampled_from(["  ", "\t", "\r\n", "\n", "▁", "<s>", "</s>", "<unk>", "<0x0A>", "==", "aa", "def ", "é"])


@settings(max_examples=300, deadline=None)
@given(parts=st.lists(st.one_of(st.text(st.characters(exclude_categories=["Cs"]), max_size=8), fragments), max_size=12))
def test_ids_and_text_agree_on_any_text(pair, parts):
    _assert_equal(*pair, "".join(parts))


def test_special_tokens_in_text_are_text_and_as_ids_are_left_out(pair):
    tokenizer, exported = pair
    assert not set(exported.all_special_ids) & set(exported.encode("<s>a</s><pad><mask>", split_special_tokens=True))
    assert exported.eos_token_id == tokenizer.eos_id
    assert (exported.bos_token_id, exported.pad_token_id) == (tokenizer.eos_id, tokenizer.pad_id)
    with_end = [*tokenizer.encode("x = 1"), tokenizer.eos_id]
    assert exported.decode(with_end, skip_special_tokens=True) == tokenizer.decode(with_end) == "x = 1"


def test_without_the_setting_tokens_of_training_are_taken_and_others_are_not(pair):
    tokenizer, exported = pair
    assert exported.encode("</s>") == [tokenizer.eos_id] != tokenizer.encode("</s>")
    assert exported.encode("<s>x<mask>") == tokenizer.encode("<s>x<mask>")


@pytest.mark.parametrize("alphabet", ["ab", "a b", "=- "])
def test_merges_agree_whatever_the_order_of_the_pieces(alphabet, tmp_path):
    """Pieces of periodic strings in any order of ranks: where splits overlap most."""
    draw = random.Random(alphabet)
    base = sentencepiece_model.ModelProto.FromString(train_sentencepiece([REPEATED] * 9, "bpe", 290))
    del base.pieces[263:]
    for case in range(60):
        units = ["".join(draw.choices(alphabet, k=draw.randint(1, 2))) for _ in range(4)]
        longer = {(unit * draw.randint(1, 5))[:7] for unit in units for _ in range(4)}
        longer |= {piece[:cut] for piece in longer for cut in range(2, len(piece))}
        ranked = sorted(piece for piece in longer if len(piece) > 1)
        draw.shuffle(ranked)
        proto = sentencepiece_model.ModelProto()
        proto.CopyFrom(base)
        for rank, piece in enumerate(ranked + sorted(set(alphabet))):
            proto.pieces.add(piece=piece.replace(" ", "\u2581"), score=-rank, type=1)
        tokenizer = saved_tokenizer(tmp_path / f"{case}.model", proto.SerializeToString())
        converted = convert(tokenizer.path)
        for _ in range(50):
            text = "".join(draw.choice(units) * draw.randint(1, 4) for _ in range(draw.randint(1, 8)))
            assert converted.encode(text).ids == tokenizer.encode(text)


def test_a_missing_merge_is_seen(tmp_path):
    """The comparison above can fail: with only one split per piece as a merge, ids differ."""
    text = SOURCES[0].read_text("utf-8", "replace")
    tokenizer = saved_tokenizer(tmp_path / "tokenizer.model", train_sentencepiece(text.splitlines(True), "bpe", 900))
    converted = convert(tokenizer.path)
    assert converted.encode(text).ids == tokenizer.encode(text)
    content = json.loads(converted.to_str())
    first_split = {"".join(merge): merge for merge in reversed(content["model"]["merges"])}
    content["model"]["merges"] = list(first_split.values())
    assert Tokenizer.from_str(json.dumps(content)).encode(text).ids != tokenizer.encode(text)


def test_unigram_text_with_the_spelling_of_a_control_piece_whose_characters_have_no_piece(tmp_path):
    model = _trained("unigram", ["only letters here and no other signs", "letters and signs"] * 30, 285)
    tokenizer = saved_tokenizer(tmp_path / "tokenizer.model", model)
    proto = sentencepiece_model.ModelProto.FromString(model)
    assert "<" not in {piece.piece for piece in proto.pieces}
    converted = convert(tokenizer.path)
    for text in ("<s>", "a<s> letters</s><mask>", "<0x41>", "x<😀>s>"):
        assert converted.encode(text).ids == tokenizer.encode(text)


def test_scores_that_round_in_fp32_are_why_unigram_scores_are_multiples_of_a_power_of_two(tmp_path):
    """The counterexample: the same model without rounded scores cuts a run of spaces elsewhere in the two libraries."""
    lines = [line for path in SOURCES[::12] for line in path.read_text("utf-8", "replace").split("\n") if line]
    model = train_sentencepiece(lines, "unigram", 900)
    texts = [path.read_text("utf-8", "replace") for path in SOURCES[::3]] + [" " * count for count in range(200)]

    def num_different(tokenizer: SentencePieceTokenizer) -> int:
        converted = convert(tokenizer.path)
        return sum(converted.encode(text).ids != tokenizer.encode(text) for text in texts)

    assert num_different(saved_tokenizer(tmp_path / "a.model", model)) > 0
    assert num_different(saved_tokenizer(tmp_path / "b.model", with_rounded_scores(model))) == 0


def test_a_model_with_other_settings_is_refused_with_every_reason(tmp_path):
    lines = ["some words to train on", "and some more words"] * 20
    model = train_sentencepiece(lines, "bpe", 320, treat_whitespace_as_suffix=True, user_defined_symbols=["<tag>"])
    tokenizer = saved_tokenizer(tmp_path / "tokenizer.model", model)
    with pytest.raises(ExportError) as raised:
        convert(tokenizer.path)
    for word in ("treat_whitespace_as_suffix", "user-defined", "tokenizer.model"):
        assert word in str(raised.value)


def test_a_tokenizer_json_is_copied(pair, tmp_path):
    tokenizer, _ = pair
    convert(tokenizer.path).save(str(tmp_path / "tokenizer.json"))
    copied = HuggingFaceTokenizer(tmp_path / "tokenizer.json")
    (tmp_path / "out").mkdir()
    write_tokenizer(tmp_path / "out", copied, named_tokens(copied), TokenizerSettings(64))
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == copied.path.read_bytes()
    exported = AutoTokenizer.from_pretrained(tmp_path / "out", local_files_only=True)
    assert (
        exported.encode("x = '<s>' ▁ y", split_special_tokens=True)
        == tokenizer.encode("x = '<s>' ▁ y")
        == copied.encode("x = '<s>' ▁ y")
    )
