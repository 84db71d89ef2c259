"""A run's checkpoint as a Hugging Face folder: its weights, its tokenizer, and what the model card says of training."""

import hashlib
from dataclasses import replace
from functools import partial
from pathlib import Path

from llmtrain.checkpoint.find import find_checkpoint
from llmtrain.checkpoint.reader import CheckpointReader
from llmtrain.config.model import ModelConfig
from llmtrain.data.storage.manifest import MANIFEST_BYTES
from llmtrain.data.token_roles import TrainedTokens
from llmtrain.files import read_bytes
from llmtrain.infer.model import (
    build_from,
    checkpoint_tensors,
    find_tokenizer_of,
    logits_of,
    saved_architecture,
    saved_config,
    saved_data,
)
from llmtrain.infer.tokenizer import model_tokenizer
from llmtrain.interop.hf_export import DTYPES, Export, ExportSettings, TrainedWeights, write_export
from llmtrain.interop.text.special_tokens import named_tokens


def export_checkpoint(
    source: Path, out: Path, tokenizer: Path | None, settings: ExportSettings
) -> tuple[CheckpointReader, Export]:
    """Write the checkpoint that a path means, and prove the export. Facts and special tokens are filled in.

    `tokenizer` takes the place of the one beside the checkpoints. Raises as `find_checkpoint` and `write_export` do.
    """
    checkpoint = find_checkpoint(source)
    weights, model = _rounded_weights(checkpoint, settings.dtype)
    tokens = TrainedTokens.of(checkpoint.about)
    text = model_tokenizer(tokenizer, find_tokenizer_of(checkpoint.path), model, tokens)
    named = named_tokens(text, saved_data(checkpoint))
    settings = replace(settings, facts=_facts(checkpoint), tokens=named)
    return checkpoint, write_export(out, model, weights, text, settings)


def _rounded_weights(checkpoint: CheckpointReader, dtype: str) -> tuple[TrainedWeights, ModelConfig]:
    """What an export takes of a checkpoint's model, its weights rounded to `dtype`, and the model's configuration."""
    model = saved_architecture(checkpoint)
    read = checkpoint_tensors(checkpoint, model, DTYPES[dtype])
    return TrainedWeights(read, lambda part, read_part: partial(logits_of, build_from(part, read_part))), model


def _facts(checkpoint: CheckpointReader) -> dict[str, str]:
    """What the model card says about training. Data sets are named by the hash of their manifest, not by a path."""
    config = saved_config(checkpoint)
    progress = checkpoint.state.get("train", {})
    facts = {"Run": str(config.get("name", "imported")), "Training steps": f"{checkpoint.step:,}"}
    if isinstance(progress, dict) and isinstance(progress.get("tokens"), int):
        facts["Training tokens"] = f"{progress['tokens']:,}"
    paths = [source.get("path") for source in saved_data(checkpoint).get("train") or () if isinstance(source, dict)]
    manifests = [Path(path, "manifest.json") for path in paths if isinstance(path, str)]
    found = [path for path in manifests if path.is_file()]
    hashes = [hashlib.sha256(read_bytes(path, MANIFEST_BYTES)).hexdigest() for path in found]
    if hashes:
        facts["Training data"] = ", ".join(f"manifest sha256 {value}" for value in hashes)
    return facts
