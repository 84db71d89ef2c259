"""Writing a model as a Hugging Face folder that loads without remote code, and proving it before it is visible."""

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig

from llmtrain.config.model import ModelConfig
from llmtrain.config.sizes import num_parameters
from llmtrain.errors import ConfigError, ExportError
from llmtrain.interop.hf import SpecialTokens, family_for, hf_config
from llmtrain.interop.name_table import ReadTensor, iter_theirs
from llmtrain.interop.proof import Logits, Proof, prove
from llmtrain.interop.tokenizer_json import TextTokenizer, write_tokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class TrainedWeights:
    """A trained model: its tensors by global name, and what it computes from them.

    For an export in lower precision both must already be rounded to it, so that the proof compares equal weights.
    """

    read: ReadTensor
    logits: Logits


@dataclass(frozen=True)
class ExportSettings:
    """How weights are stored, and facts for the model card by their label."""

    dtype: str = "float32"
    max_shard_bytes: int = 5_000_000_000
    facts: Mapping[str, str] = field(default_factory=dict)
    overwrite: bool = False
    """Replace an earlier export of the same name, once the new one is proved."""


def write_export(
    folder: Path, model: ModelConfig, weights: TrainedWeights, tokenizer: TextTokenizer, settings: ExportSettings
) -> Proof:
    """Write a Hugging Face folder, load it with transformers, compare, and only then give it its name.

    Raises ConfigError where the folder exists or no family fits, ExportError where the reloaded model differs; nothing
    is left behind then.
    """
    require_free(folder, settings.overwrite)
    family = family_for(model)
    tokens = SpecialTokens(tokenizer.eos_id, tokenizer.bos_id, tokenizer.pad_id)
    target = folder.resolve()
    writing = target.with_name(f".writing-{target.name}-{os.getpid()}")
    try:
        writing.mkdir(parents=True)
        config = hf_config(model, tokens)
        config.dtype = DTYPES[settings.dtype]
        config.save_pretrained(writing)
        GenerationConfig.from_model_config(config).save_pretrained(writing)
        write_tokenizer(writing, tokenizer, model.max_seq_len)
        dtype = DTYPES[settings.dtype]
        theirs = iter_theirs(family.table, model, weights.read)
        write_weights(writing, ((name, tensor.to(dtype)) for name, tensor in theirs), settings.max_shard_bytes)
        proof = prove(writing, weights.logits, tokenizer)
        (writing / "README.md").write_text(model_card(target.name, model, settings, proof), "utf-8")
        _put_in_place(writing, target)
    except OSError as error:
        raise ExportError(f"{error.filename or folder}: the export could not be written: {error.strerror}.") from error
    finally:
        shutil.rmtree(writing, ignore_errors=True)
    return proof


def require_free(folder: Path, overwrite: bool) -> None:
    """Raise ConfigError where a folder holds something, unless it is an export and may be replaced."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not overwrite:
        raise ConfigError(f"{folder}: exists already. Choose another name, remove it, or give --overwrite.")
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"{folder}: is no export (it has no config.json), so --overwrite leaves it. Remove it yourself."
        )


def _put_in_place(writing: Path, target: Path) -> None:
    replaced = target.with_name(f".replaced-{target.name}-{os.getpid()}")
    if target.exists():
        target.rename(replaced)
    writing.rename(target)
    shutil.rmtree(replaced, ignore_errors=True)


def write_weights(folder: Path, tensors: Iterable[tuple[str, Tensor]], max_shard_bytes: int) -> None:
    """Write model.safetensors, or shards and their index where the tensors take more than `max_shard_bytes`.

    At most one shard is in memory; a larger tensor has a shard of its own.
    """
    shards: list[dict[str, int]] = []
    held: dict[str, Tensor] = {}
    for name, tensor in tensors:
        if held and sum(other.nbytes for other in held.values()) + tensor.nbytes > max_shard_bytes:
            shards.append(_write_shard(folder, len(shards), held))
            held = {}
        held[name] = tensor.contiguous()
    shards.append(_write_shard(folder, len(shards), held))
    if len(shards) == 1:
        _shard_path(folder, 0).rename(folder / WEIGHTS)
        return
    weight_map = {}
    for number, sizes in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        _shard_path(folder, number).rename(folder / file)
        weight_map |= dict.fromkeys(sizes, file)
    total_size = sum(sum(sizes.values()) for sizes in shards)
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def _shard_path(folder: Path, number: int) -> Path:
    """Where a shard lies until their number is known."""
    return folder / f"shard-{number}.safetensors"


def _write_shard(folder: Path, number: int, tensors: dict[str, Tensor]) -> dict[str, int]:
    """Write one shard; returns the bytes of each tensor."""
    path = _shard_path(folder, number)
    save_file(tensors, path, metadata={"format": "pt"})
    # The library lets only the owner read what it writes; the other files follow the user's mask, as the folder does.
    path.chmod(folder.stat().st_mode & 0o666)
    return {name: tensor.nbytes for name, tensor in tensors.items()}


def model_card(name: str, model: ModelConfig, settings: ExportSettings, proof: Proof) -> str:
    """The README.md of an export. Names no path of the machine that it was made on."""
    facts = {
        "Architecture": family_for(model).title,
        "Parameters": f"{num_parameters(model):,}",
        "Layers": str(model.num_layers),
        "Width": f"{model.hidden_size:,}",
        "Heads": f"{model.num_heads}, for keys and values {model.kv_heads}",
        "Longest sequence": f"{model.max_seq_len:,} tokens",
        "Vocabulary": f"{model.vocabulary:,} tokens",
        "Weights": settings.dtype,
        **settings.facts,
    }
    rows = "\n".join(f"| {label} | {value} |" for label, value in facts.items())
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [llmtrain]
---

# {name}

A causal language model, trained with llmtrain.

| | |
|---|---|
{rows}

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "{name}"
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
inputs = tokenizer("def main(", return_tensors="pt", return_token_type_ids=False)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0], skip_special_tokens=True))
```

Text that spells a special token is taken as ordinary text, as it was in training.

## Checked

Before this folder was given its name, transformers loaded it, and it was compared with the trained model:

- {proof.num_tokens:,} positions: logits in fp32 differ by at most {proof.max_difference:.2e};
- {proof.num_greedy_tokens} greedy tokens are equal;
- {proof.num_text_characters:,} characters of text have equal token ids.
"""
