"""Other programs make of an export what training and `llmtrain generate` make of the run."""

from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import torch

from llmtrain.data.tokenizer import SentencePieceTokenizer
from llmtrain.infer.batching.request import Request
from llmtrain.infer.batching.sampling import Sampling
from llmtrain.infer.generate import iter_tokens
from llmtrain.infer.model import logits_of
from llmtrain.interop.examples import Example
from llmtrain.interop.hf_export import ExportSettings, write_export
from llmtrain.interop.model_card import reader_notes
from llmtrain.interop.text.special_tokens import named_tokens
from tests.support.readers import read_by, require_reader
from tests.unit.interop.models import LLAMA, MODELS, QWEN3, random_export, random_model, scaled

TEXTS = [
    "hello",
    " ",
    "  two  spaces ",
    "\tx\n\n",
    "\r\nline\r\n",
    "\U0001f600 e\u0301\u0300 \u00df \u4e2d\u6587\u5b57",
    "a\u2581b",
    "<s> x <mask><cls><0x41>",
    "def f(x):\n    return x",
    " " * 40 + "x",
]
NUM_NEW = 20
JOB: dict[str, Any] = {
    "texts": TEXTS,
    "prompt": "def abc(he",
    "max_new_tokens": NUM_NEW,
    "n_ctx": 64,
    "tokens": [list(range(5, 65))],
}
MODELS_READ = {
    **MODELS,
    "llama theta": LLAMA.with_keys({"rope_theta": 500_000.0}),
    "llama ntk": scaled("ntk"),
    "mistral yarn": scaled("yarn").with_keys({"attention": MODELS["mistral"].attention}),
    "mixtral linear": scaled("linear").with_keys({"moe": MODELS["mixtral"].moe}),
    "qwen3 llama3": scaled("llama3").with_keys({"qk_norm": True, "head_dim": 16}),
    "qwen3 theta": QWEN3.with_keys({"rope_theta": 1_000_000.0}),
}
SHORT = ["gpt2", "llama theta", "mistral yarn", "mixtral linear", "qwen3 llama3", "bert", "t5 v1.1"]

NOT_LLAMA_CPP = ("gpt2", "qwen3", "bert", "t5", "switch_transformers")
"""Families that its converter refuses with llmtrain's tokenizers."""


def _exported(names: list[str], tokenizer: SentencePieceTokenizer, place: Path) -> dict[str, Path]:
    folders = {name: place / name.replace(" ", "-") for name in names}
    for name, folder in folders.items():
        config = MODELS_READ[name]
        write_export(folder, *random_export(config, tokenizer), ExportSettings())
    return folders


def _ours(name: str, tokenizer: SentencePieceTokenizer) -> tuple[list[list[int]], list[int]]:
    """Ids of each text, and the greedy continuation of the prompt."""
    config, named = MODELS_READ[name], named_tokens(tokenizer)
    before, behind = named.frame(config.family)
    ids = [[*before, *tokenizer.encode(text), *behind] for text in [*TEXTS, JOB["prompt"]]]
    if config.family == "encoder":
        return ids[:-1], []
    encodes = config.family == "encoder_decoder"
    begin, source = ([named.start_id], ids[-1]) if encodes else (ids[-1], [])
    ends = frozenset([tokenizer.eos_id])
    request = Request(tuple(begin), NUM_NEW, Sampling(temperature=0), ends, source=tuple(source))
    return ids[:-1], list(iter_tokens(random_model(config), request))


def _require_equal(answer: dict[str, Any], name: str, tokenizer: SentencePieceTokenizer, but: tuple[str, ...] = ()):
    ids, new = _ours(name, tokenizer)
    assert "refused" not in answer, f"{name}: {answer['refused']}"
    for text, actual, expected in zip(TEXTS, answer["ids"], ids, strict=True):
        if text not in but:
            assert actual == expected, f"{name}: {text!r}"
    if new:
        assert list(takewhile(lambda token: token != tokenizer.eos_id, answer["new"])) == new, name


def _require_logits(answer: dict[str, Any], name: str) -> None:
    config, tokens = MODELS_READ[name], torch.tensor(JOB["tokens"])
    valid = torch.ones_like(tokens, dtype=torch.bool)
    example = Example(tokens) if config.family == "decoder" else Example(tokens, valid)
    if config.family == "encoder_decoder":
        example = Example(tokens, valid, tokens, valid)
    with torch.no_grad():
        expected = logits_of(random_model(config), example)[0]
    assert float((torch.tensor(answer["logits"]) - expected).abs().max()) <= 2e-4, name


@pytest.mark.parametrize(
    "names",
    [SHORT, pytest.param([name for name in MODELS_READ if name not in SHORT], marks=pytest.mark.whole_grid)],
    ids=["short", "rest"],
)
def test_transformers_4_and_5(names, small_tokenizer, tmp_path):
    require_reader("transformers 4")
    folders = _exported(names, small_tokenizer, tmp_path)
    for reader in ("transformers 4", "transformers 5"):
        answers = read_by(reader, list(folders.values()), JOB)
        for name, folder in folders.items():
            config = MODELS_READ[name]
            spelled = ("<s> x <mask><cls><0x41>",) if config.family == "encoder" else ()
            _require_equal(answers[folder], name, small_tokenizer, spelled)
            if not any(note.startswith(reader) for note in reader_notes(config)):
                _require_logits(answers[folder], name)


@pytest.mark.whole_grid
def test_ctranslate2(small_tokenizer, tmp_path):
    """It refuses yarn, experts, and Llama's head_dim; it has no text of an encoder."""
    require_reader("ctranslate2")
    left_out = ("mixtral", "switch_transformers", "bert", "llama head_dim", "mistral odd heads")
    names = [name for name in MODELS_READ if not name.startswith(left_out) and "yarn" not in name]
    folders = _exported(names, small_tokenizer, tmp_path)
    answers = read_by("ctranslate2", list(folders.values()), JOB)
    for name, folder in folders.items():
        if not any(note.startswith("CTranslate2") for note in reader_notes(MODELS_READ[name])):
            _require_equal(answers[folder], name, small_tokenizer)


@pytest.mark.whole_grid
def test_llama_cpp(small_tokenizer, tmp_path):
    """Its space is U+2581, so this character is a space there. What it would read wrongly it refuses."""
    require_reader("llama_cpp")
    folders = _exported(list(MODELS_READ), small_tokenizer, tmp_path)
    answers = read_by("llama_cpp", list(folders.values()), JOB)
    for name, folder in folders.items():
        if name.startswith(NOT_LLAMA_CPP):
            assert "refused" in answers[folder], name
        elif not any(note.startswith("llama.cpp") for note in reader_notes(MODELS_READ[name])):
            _require_equal(answers[folder], name, small_tokenizer, ("a\u2581b",))


@pytest.mark.whole_grid
def test_llama_cpp_refuses_a_tokenizer_json_alone(small_tokenizer, tmp_path):
    """As in a second export of an own one: it was taken for Llama's, with other ids for every text."""
    require_reader("llama_cpp")
    (folder,) = _exported(["llama"], small_tokenizer, tmp_path).values()
    (folder / "tokenizer.model").unlink()
    assert "refused" in read_by("llama_cpp", [folder], JOB)[folder]


@pytest.mark.whole_grid
def test_llama_cpp_reads_qwen3_with_the_tokenizer_beside_and_no_space_before(small_tokenizer, tmp_path):
    """What docs/clients.md says to do."""
    require_reader("llama_cpp")
    (folder,) = _exported(["qwen3"], small_tokenizer, tmp_path).values()
    (folder / "tokenizer.model").write_bytes(small_tokenizer.path.read_bytes())
    override = {"overrides": {"tokenizer.ggml.add_space_prefix": False}}
    _require_equal(read_by("llama_cpp", [folder], JOB | override)[folder], "qwen3", small_tokenizer, ("a\u2581b",))
    assert read_by("llama_cpp", [folder], JOB)[folder]["ids"][0] != small_tokenizer.encode("hello"), "still needed"
