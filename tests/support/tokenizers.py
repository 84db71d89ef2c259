"""Small sentencepiece models with the settings of `llmtrain data tokenizer`."""

import io
from collections.abc import Iterable
from pathlib import Path

import sentencepiece

from llmtrain.data.tokenizer import SentencePieceTokenizer


def train_sentencepiece(lines: Iterable[str], kind: str, vocab_size: int, **settings: object) -> bytes:
    """A model whose pieces begin with pad, unk, bos, eos, mask, cls, sep and the 256 bytes."""
    model = io.BytesIO()
    wanted = {
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "add_dummy_prefix": False,
        "byte_fallback": True,
        "pad_id": 0,
        "unk_id": 1,
        "bos_id": 2,
        "eos_id": 3,
        "control_symbols": ["<mask>", "<cls>", "<sep>"],
        "hard_vocab_limit": False,
        "num_threads": 1,
        "minloglevel": 2,
        **settings,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, model_type=kind, vocab_size=vocab_size, **wanted
    )
    return model.getvalue()


def saved_tokenizer(path: Path, model: bytes) -> SentencePieceTokenizer:
    """The tokenizer of a model that is written to `path` first."""
    path.write_bytes(model)
    return SentencePieceTokenizer(path)
