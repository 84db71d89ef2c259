"""`llmtrain export` and `llmtrain import`: to and from Hugging Face folders."""

import json
import re
from collections.abc import Iterator, Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmtrain.errors import ConfigError

if TYPE_CHECKING:
    from llmtrain.checkpoint.reader import CheckpointReader
    from llmtrain.config.model import ModelConfig
    from llmtrain.config.objective import ObjectiveName
    from llmtrain.data.tokenizer import Tokenizer
    from llmtrain.infer.tokenizer import FolderTokenizer
    from llmtrain.interop.hf_export import Export, TrainedWeights
    from llmtrain.interop.hf_import import HuggingFaceFolder
    from llmtrain.values.fragment import Fragment

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


class Format(StrEnum):
    """What a model is written as."""

    HF = "hf"


class ProofKind(StrEnum):
    """How an export is compared with the trained model."""

    AUTO = "auto"
    FULL = "full"
    LAYERS = "layers"


class Precision(StrEnum):
    """Type of the exported weights."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


def export(
    source: Annotated[Path, typer.Argument(help="A run (its newest valid checkpoint) or a checkpoint.")],
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    to: Annotated[Format, typer.Option(help="hf: a folder that transformers loads.")] = Format.HF,
    dtype: Annotated[Precision, typer.Option(help="Type of the weights.")] = Precision.FLOAT32,
    max_shard_size: Annotated[str, typer.Option(help="Largest weight file, such as 500MB.")] = "5GB",
    tokenizer: Annotated[Path | None, typer.Option(help="Instead of the one beside the checkpoints.")] = None,
    family: Annotated[str | None, typer.Option(help="transformers' model_type, where several would do.")] = None,
    proof: Annotated[
        ProofKind,
        typer.Option(help="full: both models in memory. layers: some layers at a time. auto: full where it fits."),
    ] = ProofKind.AUTO,
    proof_memory: Annotated[str, typer.Option(help="Memory that a full proof may take with auto.")] = "16GB",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Write a trained model as a Hugging Face folder, and prove that transformers computes the same from it.

    Weights are read and written some at a time: memory is that of the largest file, and of the proof.
    """
    from llmtrain.interop.installation import require_transformers

    require_transformers()
    from llmtrain.checkpoint.find import find_checkpoint
    from llmtrain.data.token_roles import TrainedTokens
    from llmtrain.infer.model import find_tokenizer_of, saved_data
    from llmtrain.infer.tokenizer import model_tokenizer
    from llmtrain.interop.hf_export import ExportSettings, require_free, write_export
    from llmtrain.interop.text.special_tokens import named_tokens

    max_shard_bytes = _size_bytes("--max-shard-size", max_shard_size)
    proof_bytes = _size_bytes("--proof-memory", proof_memory)
    require_free(out, overwrite)
    _require_place(out)
    checkpoint = find_checkpoint(source)
    weights, model = _rounded_weights(checkpoint, dtype)
    tokens = TrainedTokens.of(checkpoint.about)
    text = model_tokenizer(tokenizer, find_tokenizer_of(checkpoint.path), model, tokens)
    settings = ExportSettings(
        dtype=dtype.value,
        max_shard_bytes=max_shard_bytes,
        facts=_facts(checkpoint),
        overwrite=overwrite,
        family=family,
        proof=proof.value,
        proof_bytes=proof_bytes,
        tokens=named_tokens(text, saved_data(checkpoint)),
    )
    export = write_export(out, model, weights, text, settings)
    _print_result(
        {"format": to.value, "folder": str(out), "checkpoint": str(checkpoint.path)} | _told(export, dtype), as_json
    )


def _told(export: "Export", dtype: Precision) -> dict[str, Any]:
    """What was written and what was proved."""
    proof = export.proof
    return {
        "family": export.family,
        "dtype": dtype.value,
        "proof": "the whole model" if proof.num_parts == 1 else f"{proof.num_parts} parts, some layers in each",
        "max_logit_difference": proof.max_difference,
        "logit_positions_compared": proof.num_tokens,
        "greedy_tokens_equal": proof.num_greedy_tokens,
        "text_characters_equal": proof.num_text_characters,
        "notes": export.notes,
    }


def import_(
    source: Annotated[Path, typer.Argument(help="A Hugging Face folder with config.json and safetensors.")],
    out: Annotated[Path, typer.Argument(help="Folder to write; must not exist or be empty.")],
    as_json: JsonOption = False,
) -> None:
    """Read a Hugging Face folder as a checkpoint of step 0, with its configuration and tokenizer beside it.

    Train from it with `base: OUT/config.yaml` and `checkpoint.resume=OUT`. Weights are read and written some at a time.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out}: exists already. Choose another name, or remove it.")
    _require_place(out)

    from llmtrain.config.parameter_shapes import num_parameters
    from llmtrain.interop.installation import require_transformers

    require_transformers()
    from llmtrain.infer.tokenizer import folder_tokenizer
    from llmtrain.interop.hf_import import open_hf_folder

    folder = open_hf_folder(source)
    found = folder_tokenizer(source, folder.model)
    checkpoint = _write_imported(folder, found, out)
    _print_result(
        {
            "folder": str(out),
            "checkpoint": str(checkpoint),
            "config": str(out / "config.yaml"),
            "tokenizer": None if found.name is None else str(out / found.name),
            "family": folder.family.title,
            "parameters": num_parameters(folder.model),
            "notes": [*folder.notes, *found.notes],
        },
        as_json,
    )


def _rounded_weights(checkpoint: "CheckpointReader", dtype: Precision) -> "tuple[TrainedWeights, ModelConfig]":
    """What an export takes of a checkpoint's model, its weights rounded to `dtype`, and the model's configuration."""
    from functools import partial

    from llmtrain.infer.model import build_from, checkpoint_tensors, logits_of, saved_architecture
    from llmtrain.interop.hf_export import DTYPES, TrainedWeights

    model = saved_architecture(checkpoint)
    read = checkpoint_tensors(checkpoint, model, DTYPES[dtype.value])
    return TrainedWeights(read, lambda part, read_part: partial(logits_of, build_from(part, read_part))), model


def _facts(checkpoint: "CheckpointReader") -> dict[str, str]:
    """What the model card says about training. Data sets are named by the hash of their manifest, not by a path."""
    import hashlib

    from llmtrain.data.storage.manifest import MANIFEST_BYTES
    from llmtrain.files import read_bytes
    from llmtrain.infer.model import saved_config, saved_data

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


IMPORT_PART_BYTES = 1_000_000_000
"""Weights that are in memory at a time; a larger tensor is alone."""


def _write_imported(
    folder: "HuggingFaceFolder", found: "FolderTokenizer", out: Path, part_bytes: int = IMPORT_PART_BYTES
) -> Path:
    """Write OUT as a run folder with one checkpoint; returns the checkpoint. Nothing is left where it fails."""
    import os
    import shutil

    from llmtrain.checkpoint.folders import CHECKPOINTS
    from llmtrain.checkpoint.writer import Contents, publish, start_checkpoint, write_rank_files

    config_text = _config_yaml(folder, found.tokenizer)
    target = out.resolve()
    writing = target.with_name(f".writing-{target.name}-{os.getpid()}")
    try:
        unfinished = start_checkpoint(writing / CHECKPOINTS, step=0)
        # Part after part takes the place of rank after rank: nobody has to hold it all.
        groups = enumerate(_iter_groups(folder, part_bytes))
        parts = [write_rank_files(unfinished, number, group) for number, group in groups]
        contents = Contents(0, {}, config_text, {"imported": folder.family.title, **found.about()})
        checkpoint = publish(unfinished, parts, contents, before_publish=lambda: None)
        (writing / "config.yaml").write_text(config_text, "utf-8")
        found.write(writing)
        if target.exists():
            target.rmdir()
        writing.rename(target)
    finally:
        shutil.rmtree(writing, ignore_errors=True)
    return out / checkpoint.relative_to(writing)


def _iter_groups(folder: "HuggingFaceFolder", part_bytes: int) -> "Iterator[list[Fragment]]":
    """Fragments that together take at most so much, or a single one."""
    from llmtrain.checkpoint.writer import size_bytes

    group: list[Fragment] = []
    for fragment in _iter_fragments(folder):
        if group and size_bytes(group) + fragment.tensor.nbytes > part_bytes:
            yield group
            group = []
        group.append(fragment)
    yield group


def _iter_fragments(folder: "HuggingFaceFolder") -> "Iterator[Fragment]":
    """Every tensor of a folder as a fragment; each expert of stacked ones is one."""
    from llmtrain.config.parameter_shapes import parameter_shapes
    from llmtrain.values.fragment import Box, Fragment

    shapes = parameter_shapes(folder.model)
    for name, expert, tensor in folder.iter_tensors():
        if expert is None:
            yield Fragment.whole(name, "master", tensor)
        else:
            box = Box((expert, *[0] * tensor.dim()), (1, *tensor.shape))
            yield Fragment(name, "master", shapes[name], box, tensor[None])


def _config_yaml(folder: "HuggingFaceFolder", tokenizer: "Tokenizer | None") -> str:
    """What a run's configuration can rest on: the model, and what to train such a model on next."""
    import io

    from ruamel.yaml import YAML

    config: dict[str, Any] = {"model": folder.model.model_dump(mode="json")}
    objectives: dict[str, ObjectiveName] = {"encoder": "masked", "encoder_decoder": "span_corruption"}
    if objective := objectives.get(folder.model.family):
        config["data"] = {"objective": objective, "special_tokens": _special_tokens(folder, tokenizer, objective)}
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    # The default, None, sorts; ruamel declares no type, so that a checker infers that only None is allowed.
    yaml.sort_base_mapping_type_on_output = False  # pyright: ignore[reportAttributeAccessIssue]
    stream = io.StringIO()
    yaml.dump(config, stream)
    return stream.getvalue()


def _special_tokens(
    folder: "HuggingFaceFolder", tokenizer: "Tokenizer | None", objective: "ObjectiveName"
) -> dict[str, Any]:
    """Ids of the folder's tokenizer for data.special_tokens, those that the objective needs."""
    from llmtrain.config.objective import needed_tokens
    from llmtrain.infer.tokenizer import decoder_start
    from llmtrain.interop.text.special_tokens import named_tokens

    if tokenizer is None:
        return {}
    named = named_tokens(tokenizer)
    # Of an encoder-decoder, padding begins what the decoder reads.
    start = decoder_start(tokenizer) if folder.model.family == "encoder_decoder" else None
    found = {
        "mask": named.mask and named.mask[1],
        "pad": named.pad and named.pad[1] if start is None else start,
        "sentinels": list(named.sentinels.values()) or None,
    }
    needed = needed_tokens(folder.model.family, objective)
    return {key: found[key] for key in needed if found[key] is not None}


def _require_place(out: Path) -> None:
    """Raise ConfigError where no folder of that name can be made, before anything is read."""
    import os

    above = next(path for path in out.absolute().parents if path.exists() or path.is_symlink())
    if not above.is_dir():
        raise ConfigError(f"{out}: cannot be made, for {above} is no folder. Choose another place.")
    if not os.access(above, os.W_OK | os.X_OK):
        raise ConfigError(f"{out}: cannot be made, for nothing can be written to {above}. Choose another place.")


def _size_bytes(option: str, text: str) -> int:
    match = re.fullmatch(r"(\d{1,15})\s*(|KB|MB|GB)", text.strip().upper())
    if match is None or int(match[1]) == 0:
        raise ConfigError(f"{option} {text}: must be a number of bytes, or one with KB, MB or GB such as 500MB.")
    return int(match[1]) * _UNITS[match[2]]


def _print_result(result: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(result, indent=1))
        return
    for key, value in result.items():
        if isinstance(value, list):
            for text in value:
                typer.echo(f"note: {text}")
        elif value is not None:
            shown = f"{value:,}" if isinstance(value, int) else f"{value:.2e}" if isinstance(value, float) else value
            typer.echo(f"{key.replace('_', ' ')}: {shown}")
