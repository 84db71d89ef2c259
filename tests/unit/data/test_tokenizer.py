from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data_pipelines.tokenizer import Kind, train_tokenizer
from llmtrain.data.storage.folders import find_tokenizer
from llmtrain.data.tokenizer import load_tokenizer
from llmtrain.errors import ConfigError, DataError
from llmtrain.values.tokenizer import Tokenizer

CORPUS = [
    f"def function_{number}(value):\n    if value > {number}:\n        return [value] * {number}\n\n\n"
    for number in range(60)
] + ["The tokenizer is trained on text, with new lines and indentation kept.\n\n    So be it.\n"] * 20


def train_hugging_face(path: Path, eos: str = "</s>") -> None:
    """A byte-level tokenizer.json, as many published models have."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", eos],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(CORPUS, trainer)
    model.save(str(path))


@pytest.fixture(scope="module", params=["bpe", "unigram", "json"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    if request.param == "json":
        train_hugging_face(folder / "tokenizer.json")
        return load_tokenizer(folder / "tokenizer.json")
    return train_tokenizer(CORPUS, folder / "tokenizer.model", 360, request.param)


any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
awkward_text = st.text(st.sampled_from("a \t\n\r\0▁▅\u2047\ufffd\ufeff<s>/0x1mask|éß\U0001f600"), max_size=60)


@given(text=any_text | awkward_text)
@example("")
@example("</s><s><pad><unk><mask><cls><sep><0x41><|endoftext|>")
@example("▁")
@example(" ▁ a▁▁b ")
@example("\0\0")
@example("  \n\t x \r\n\r\n  ")
@example("line " * 20_000 + "x" * 70_000)
@settings(max_examples=150, deadline=None)
def test_decoding_gives_the_text_back(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= token < tokenizer.vocab_size for token in ids)
    assert not {tokenizer.eos_id, tokenizer.bos_id, tokenizer.pad_id} & set(ids)


def test_batches_equal_single_texts_for_every_number_of_threads(tokenizer: Tokenizer) -> None:
    texts = [*CORPUS, "", "a▁b", "\0"]
    singles = [tokenizer.encode(text) for text in texts]
    for num_threads in (1, 3):
        batch = tokenizer.encode_batch(texts, num_threads)
        assert [ids.tolist() for ids in batch] == singles
        assert all(np.issubdtype(ids.dtype, np.integer) for ids in batch)


def test_special_tokens_are_left_out_of_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("text")
    assert tokenizer.decode([*ids, tokenizer.eos_id]) == "text"


def test_half_of_a_surrogate_pair_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="character 2"):
        tokenizer.encode("ab\ud800")


def test_special_pieces_have_fixed_ids(tmp_path: Path) -> None:
    trained = train_tokenizer(CORPUS, tmp_path / "a.model", 400)
    assert (trained.pad_id, trained.bos_id, trained.eos_id, trained.vocab_size) == (0, 2, 3, 400)
    pieces = [trained._model.id_to_piece(number) for number in range(7)]
    assert pieces == ["<pad>", "<unk>", "<s>", "</s>", "<mask>", "<cls>", "<sep>"]


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_training_is_deterministic(tmp_path: Path, kind: Kind) -> None:
    first = train_tokenizer(CORPUS, tmp_path / "a.model", 360, kind)
    second = train_tokenizer(iter(CORPUS), tmp_path / "b.model", 360, kind)
    assert first.sha256 == second.sha256


def test_newlines_and_indentation_become_pieces(tmp_path: Path) -> None:
    trained = train_tokenizer(CORPUS, tmp_path / "a.model", 400)
    pieces = {trained._model.id_to_piece(number) for number in range(400)}
    assert {":\n", "\n\n", "▁▁▁▁"} <= pieces


def test_characters_that_sentencepiece_would_drop_chunks_for_cost_nothing(tmp_path: Path) -> None:
    """NUL and U+2585 make sentencepiece skip what stands around them: the words beside them must still be learned."""
    trained = train_tokenizer(["zebra\0zebra\u2585zebra\u2581zebra\n"] * 50, tmp_path / "a.model", 275)
    assert len(trained.encode("zebra")) == 1
    assert trained.decode(trained.encode("\0\u2585\u2581")) == "\0\u2585\u2581"


@pytest.mark.parametrize(("vocab_size", "says"), [(100, "at least"), (50_000, "at most")])
@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_unfit_vocabulary_size_names_a_fit_one(tmp_path: Path, vocab_size: int, says: str, kind: Kind) -> None:
    with pytest.raises(ConfigError, match=f"--vocab-size {vocab_size}: .*{says} .* Try") as error:
        train_tokenizer(CORPUS, tmp_path / "a.model", vocab_size, kind)
    assert not list(tmp_path.iterdir())
    advice = int("".join(filter(str.isdigit, str(error.value).split("Try ")[1].split(",")[0])))
    if says == "at most":
        assert train_tokenizer(CORPUS, tmp_path / "a.model", advice, kind).vocab_size == advice


def test_training_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no text"):
        train_tokenizer([], tmp_path / "a.model", 400)
    with pytest.raises(ConfigError, match=r"end with \.model"):
        train_tokenizer(CORPUS, tmp_path / "a.json", 400)

    def broken() -> Iterator[str]:
        yield "text"
        raise DataError("line 7 is broken")

    with pytest.raises(DataError, match="line 7"):
        train_tokenizer(broken(), tmp_path / "a.model", 400)


def test_files_that_are_no_tokenizer_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load_tokenizer(tmp_path / "none.model")
    for name in ("a.model", "a.json"):
        (tmp_path / name).write_bytes(b"not a tokenizer")
        with pytest.raises(DataError, match=name):
            load_tokenizer(tmp_path / name)
    train_hugging_face(tmp_path / "b.json", eos="<strange>")
    with pytest.raises(DataError, match="end-of-sequence"):
        load_tokenizer(tmp_path / "b.json")


def test_tokenizer_is_found_beside_the_shards(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    with pytest.raises(ConfigError, match=r"tokenizer\.model"):
        find_tokenizer(tmp_path / "train")
    (tmp_path / "tokenizer.json").touch()
    assert find_tokenizer(tmp_path / "train") == tmp_path / "tokenizer.json"
