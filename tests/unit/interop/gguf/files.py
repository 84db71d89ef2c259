"""GGUF files of tiny models, and files that are spoiled on purpose."""

import struct
from pathlib import Path
from typing import Any

from llmtrain.config.model import ModelConfig
from llmtrain.data.tokenizer import SentencePieceTokenizer
from llmtrain.interop.gguf import export
from llmtrain.interop.gguf.export import GgufExport, GgufSettings, write_gguf
from llmtrain.interop.gguf.file_format import MAGIC, TensorType, Value
from llmtrain.interop.gguf.writing import GgufPart, write_file
from tests.unit.interop.models import random_export

ANY_INCREASE = 1e6
"""Random models have nothing that storing could spoil."""


def written(
    folder: Path, config: ModelConfig, tokenizer: SentencePieceTokenizer, type: TensorType = TensorType.F32
) -> GgufExport:
    """An export of a random model."""
    settings = GgufSettings(type, ANY_INCREASE, overwrite=True)
    return write_gguf(folder, *random_export(config, tokenizer), settings)


def without_llama_cpp(monkeypatch: Any) -> None:
    """As where the extra is not installed."""
    monkeypatch.setattr(export, "can_prove", lambda: False)


def header(num_tensors: int, pairs: bytes = b"", num_pairs: int = 0, rows: bytes = b"") -> bytes:
    """The beginning of a file, as it is said to be."""
    return MAGIC + struct.pack("<IQQ", 3, num_tensors, num_pairs) + pairs + rows


def text(content: bytes) -> bytes:
    return struct.pack("<Q", len(content)) + content


def row(name: bytes, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def rewritten(path: Path, original: Any, changes: dict[str, Value | None], tensors: list[GgufPart]) -> Path:
    """A file with other keys (None: without one) and these tensors."""
    metadata = {**original.metadata, **changes}
    path.unlink(missing_ok=True)
    write_file(path, {key: value for key, value in metadata.items() if value is not None}, tensors)
    return path
