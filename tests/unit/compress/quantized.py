"""Tiny models of ours, as sources of compressed ones, quantized into folders, and texts for them."""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

from llmtrain.compress.quantize import Compressed, Compression, compress
from llmtrain.compress.source import ModelSource
from llmtrain.config.model import ModelConfig
from llmtrain.infer.hugging_face import folder_special_tokens
from llmtrain.interop.hf_export import ExportSettings
from llmtrain.interop.text.special_tokens import named_tokens
from llmtrain.models.transformer import Transformer
from llmtrain.values.batch import Batch
from llmtrain.values.tokenizer import Tokenizer
from tests.support.samples import random_batch
from tests.unit.interop.models import weights_of


def source_of(model: Transformer, tokenizer: Tokenizer) -> ModelSource:
    """A model in memory, as if it were read from somewhere."""
    config: ModelConfig = model.config
    special = folder_special_tokens(config, tokenizer)
    read = weights_of(model).read
    return ModelSource(
        Path("memory"), config, read, tokenizer, named_tokens(tokenizer), {}, {"data": {"special_tokens": special}}
    )


def quantize(model: Transformer, tokenizer: Tokenizer, out: Path, text: Path, scheme: str, **asked: Any) -> Compressed:
    """Quantize it. Random weights say nothing about text: any perplexity will do, unless it is said."""
    names = {"dtype": "float32", "proof": "full", "overwrite": False}
    settings = ExportSettings(**{name: asked.pop(name, usual) for name, usual in names.items()})
    if scheme == "w4a16":
        asked.setdefault("group", 16)
    whole = {"evaluate": str(text), "samples": 8, "max_increase": 1e6, **asked}
    return compress(source_of(model, tokenizer), out, Compression(scheme, **whole), settings, lambda said: None)


def random_text(config: ModelConfig, seed: int = 1) -> Batch:
    """Random tokens, as a model of this family takes them."""
    batch = random_batch(3, seed=seed)
    if config.family != "encoder_decoder":
        return batch
    return replace(batch, encoder_tokens_BT=random_batch(3, 20, seed=seed + 100).tokens_BS)


def digest(folder: Path) -> str:
    """A hash of the names and contents of a folder's files."""
    found = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        found.update(path.name.encode() + b"\0" + path.read_bytes())
    return found.hexdigest()
