"""Tokenizers in llama.cpp: byte pairs over bytes with each known way to cut words, and conversations."""

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, models, trainers
from tokenizers.pre_tokenizers import ByteLevel

from llmtrain.data.tokenizer import load_tokenizer
from llmtrain.errors import ExportError
from llmtrain.infer.chat import chat_examples
from llmtrain.interop.gguf.export import GgufSettings, write_gguf
from llmtrain.interop.gguf.pretokenizers import CUTTINGS, pretokenizer_steps
from llmtrain.interop.gguf.reading import read_header
from llmtrain.interop.gguf.tokenizer_files import write_tokenizer_files
from llmtrain.interop.proof import HARD_TEXTS
from llmtrain.interop.text.special_tokens import named_tokens
from tests.unit.interop.gguf.files import ANY_INCREASE, written
from tests.unit.interop.models import LLAMA, model_for, random_model, weights_of
from tests.unit.interop.test_chat_export import CHAT, source_of

TEXT = Path(json.__file__).read_text("utf-8") + "It's WE'LL 1234 56 ½ été 中文字 😀\r\n\t  x" * 9


def byte_tokenizer(path: Path, name: str, normalizer: dict[str, str] | None = None, vocab_size: int = 400) -> Path:
    """A tokenizer.json that cuts words as llama.cpp's `name` does."""
    steps = pretokenizer_steps(CUTTINGS[name])
    tokenizer = Tokenizer(models.BPE())
    content = json.loads(tokenizer.to_str()) | {"pre_tokenizer": steps, "normalizer": normalizer}
    tokenizer = Tokenizer.from_str(json.dumps(content))
    alphabet = sorted(ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.add_special_tokens([AddedToken("<|endoftext|>", special=True, normalized=False)])
    content = json.loads(tokenizer.to_str())
    content["model"]["ignore_merges"] = CUTTINGS[name].ignore_merges
    content["decoder"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    path.mkdir()
    (path / "tokenizer.json").write_text(json.dumps(content), "utf-8")
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    return path / "tokenizer.json"


@pytest.mark.parametrize(
    "name",
    [name if name in ("llama-bpe", "qwen2") else pytest.param(name, marks=pytest.mark.whole_grid) for name in CUTTINGS],
)
def test_byte_pairs_are_those_of_llama_cpp(name, llama_cpp, tmp_path):
    normalizer = {"type": "NFC"} if name == "qwen2" else None
    tokenizer = load_tokenizer(byte_tokenizer(tmp_path / "tokenizer", name, normalizer))
    config = LLAMA.with_keys({"vocab_size": tokenizer.vocab_size + 3})  # more rows than tokens
    found = written(tmp_path / "out", config, tokenizer)
    assert found.proof is not None and found.proof.num_text_characters > 3000
    assert any("NFC" in note for note in found.notes) == (normalizer is not None)

    header = read_header(tmp_path / "out" / found.file)
    assert header.metadata["tokenizer.ggml.pre"] == name
    (tmp_path / "back").mkdir()
    assert write_tokenizer_files(tmp_path / "back", header.metadata, header.path) == []
    back = load_tokenizer(tmp_path / "back" / "tokenizer.json")
    for text in (TEXT, *HARD_TEXTS):
        if normalizer is None or text.isascii():
            assert back.encode(text) == tokenizer.encode(text), text
    assert back.eos_id == tokenizer.eos_id


def test_another_way_to_cut_words_is_refused(tmp_path):
    path = byte_tokenizer(tmp_path / "tokenizer", "llama-bpe")
    content = json.loads(path.read_text("utf-8"))
    content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\p{L}+|\s+"
    path.write_text(json.dumps(content), "utf-8")
    tokenizer = load_tokenizer(path)
    with pytest.raises(ExportError, match="has no such tokenizer"):
        written(tmp_path / "out", LLAMA.with_keys({"vocab_size": tokenizer.vocab_size}), tokenizer)


def test_a_wrong_name_for_the_way_is_caught(llama_cpp, tmp_path, monkeypatch):
    from llmtrain.interop.gguf import vocabulary

    tokenizer = load_tokenizer(byte_tokenizer(tmp_path / "tokenizer", "llama-bpe"))
    monkeypatch.setattr(vocabulary, "pretokenizer_name", lambda content: "gpt-2")
    with pytest.raises(ExportError, match=r"llama\.cpp gives other ids"):
        written(tmp_path / "out", LLAMA.with_keys({"vocab_size": tokenizer.vocab_size}), tokenizer)


@pytest.mark.parametrize("kind", ["sentencepiece", pytest.param("json", marks=pytest.mark.whole_grid)])
def test_conversations_have_the_ids_of_training(kind, llama_cpp, tmp_path):
    tokenizer = source_of(kind, tmp_path).encoder.tokenizer
    config = LLAMA.with_keys({"vocab_size": tokenizer.vocab_size})
    tokens, chats = named_tokens(tokenizer, CHAT), chat_examples(tokenizer)
    trained = model_for(config, tokenizer, tokens=tokens, chats=chats)
    settings = GgufSettings(max_perplexity_increase=ANY_INCREASE)
    found = write_gguf(tmp_path / "out", trained, weights_of(random_model(config)), settings)
    assert found.proof is not None and found.proof.num_chats == len(chats.examples) > 3
    metadata = read_header(tmp_path / "out" / found.file).metadata
    assert metadata["tokenizer.chat_template"] == chats.template
    ends = {metadata["tokenizer.ggml.eos_token_id"], metadata["tokenizer.ggml.eot_token_id"]}
    assert ends == {tokenizer.eos_id, tokenizer.special_id("<|im_end|>")}


def test_damaged_vocabularies_are_refused(small_tokenizer, tmp_path):
    from llmtrain.errors import DataError
    from llmtrain.interop.gguf.vocabulary import file_vocabulary

    right = file_vocabulary(small_tokenizer, named_tokens(small_tokenizer), 307, None, frozenset()).keys
    assert write_tokenizer_files(tmp_path, right, Path("x")) == []
    spoiled = {
        "tokens": (5, ["a"] * 307, [1] * 307, []),
        "token_type": ([1], [77] * 307, ["a"] * 307),
        "scores": ([1.0], ["a"] * 307, 1.0),
        "eos_token_id": (-1, 307, "a", 1.5),
    }
    for key, values in spoiled.items():
        for value in values:
            with pytest.raises(DataError, match="x: tokenizer"):
                write_tokenizer_files(tmp_path, {**right, f"tokenizer.ggml.{key}": value}, Path("x"))
    for key, value in (("model", "t5"), ("model", 5)):
        notes = write_tokenizer_files(tmp_path / "none", {**right, f"tokenizer.ggml.{key}": value}, Path("x"))
        assert "not kept" in notes[0]
