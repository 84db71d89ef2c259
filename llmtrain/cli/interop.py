"""`llmtrain export` and `llmtrain import`: to and from Hugging Face folders."""

import json
import re
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmtrain.errors import ConfigError

if TYPE_CHECKING:
    from llmtrain.checkpoint.reader import CheckpointReader
    from llmtrain.interop.hf_import import HuggingFaceFolder

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


class Format(StrEnum):
    """What a model is written as."""

    HF = "hf"


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
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Write a trained model as a Hugging Face folder, and prove that transformers computes the same from it."""
    from llmtrain.data.tokenizer import load_tokenizer
    from llmtrain.infer.model import find_checkpoint, find_tokenizer_of
    from llmtrain.interop.hf_export import ExportSettings, require_free, write_export

    max_shard_bytes = _size_bytes(max_shard_size)
    require_free(out, overwrite)
    checkpoint = find_checkpoint(source)
    tokenizer_path = tokenizer or find_tokenizer_of(checkpoint.path)
    if tokenizer_path is None:
        raise ConfigError(f"{source}: no tokenizer lies in its run folder. Name one with --tokenizer.")
    text = load_tokenizer(tokenizer_path)

    weights, model = _rounded_weights(checkpoint, dtype)
    settings = ExportSettings(dtype.value, max_shard_bytes, _facts(checkpoint), overwrite)
    proof = write_export(out, model, weights, text, settings)
    _print_result(
        {
            "format": to.value,
            "folder": str(out),
            "checkpoint": str(checkpoint.path),
            "dtype": dtype.value,
            "max_logit_difference": proof.max_difference,
            "logit_positions_compared": proof.num_tokens,
            "greedy_tokens_equal": proof.num_greedy_tokens,
            "text_characters_equal": proof.num_text_characters,
        },
        as_json,
    )


def import_(
    source: Annotated[Path, typer.Argument(help="A Hugging Face folder with config.json and safetensors.")],
    out: Annotated[Path, typer.Argument(help="Folder to write; must not exist or be empty.")],
    as_json: JsonOption = False,
) -> None:
    """Read a Hugging Face folder as a checkpoint of step 0, with its configuration and tokenizer beside it.

    Train from it with `base: OUT/config.yaml` and `checkpoint.resume=OUT`.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out}: exists already. Choose another name, or remove it.")

    from llmtrain.config.sizes import num_parameters
    from llmtrain.interop.hf_import import open_hf_folder

    folder = open_hf_folder(source)
    checkpoint = _write_imported(folder, out)
    _print_result(
        {
            "folder": str(out),
            "checkpoint": str(checkpoint),
            "config": str(out / "config.yaml"),
            "tokenizer": None if folder.tokenizer_path is None else str(out / folder.tokenizer_path.name),
            "family": folder.family.title,
            "parameters": num_parameters(folder.model),
        },
        as_json,
    )


def _rounded_weights(checkpoint: "CheckpointReader", dtype: Precision) -> tuple[Any, Any]:
    """What an export takes of a checkpoint's model, its weights rounded to `dtype`, and the model's configuration."""
    import torch

    from llmtrain.infer.model import TrainedModel, build_trained, saved_architecture
    from llmtrain.interop.hf_export import DTYPES, TrainedWeights

    trained = TrainedModel(build_trained(saved_architecture(checkpoint), checkpoint, torch.device("cpu")), None)
    parameters = {name: parameter.detach() for name, parameter in trained.model.named_parameters()}
    for parameter in parameters.values():
        parameter.copy_(parameter.to(DTYPES[dtype.value]))
    return TrainedWeights(parameters.__getitem__, trained.logits), trained.model.config


def _facts(checkpoint: "CheckpointReader") -> dict[str, str]:
    """What the model card says about training. Data sets are named by the hash of their manifest, not by a path."""
    import hashlib

    from ruamel.yaml import YAML

    config = YAML(typ="safe", pure=True).load(checkpoint.config_text)
    progress = checkpoint.state.get("train", {})
    facts = {"Run": str(config.get("name", "imported")), "Training steps": f"{checkpoint.step:,}"}
    if "tokens" in progress:
        facts["Training tokens"] = f"{progress['tokens']:,}"
    manifests = [Path(data["path"], "manifest.json") for data in config.get("data", {}).get("train", ())]
    hashes = [hashlib.sha256(path.read_bytes()).hexdigest() for path in manifests if path.is_file()]
    if hashes:
        facts["Training data"] = ", ".join(f"manifest sha256 {value}" for value in hashes)
    return facts


def _write_imported(folder: "HuggingFaceFolder", out: Path) -> Path:
    """Write OUT as a run folder with one checkpoint; returns the checkpoint. Nothing is left where it fails."""
    import os
    import shutil

    from llmtrain.checkpoint.folders import CHECKPOINTS
    from llmtrain.checkpoint.fragments import Fragment
    from llmtrain.checkpoint.writer import Contents, publish, start_checkpoint, write_rank_files

    config_text = _model_yaml(folder.model.model_dump(mode="json"))
    target = out.resolve()
    writing = target.with_name(f".writing-{target.name}-{os.getpid()}")
    try:
        unfinished = start_checkpoint(writing / CHECKPOINTS, step=0)
        fragments = (Fragment.whole(name, "master", folder.tensor(name)) for name in folder.names())
        part = write_rank_files(unfinished, 0, fragments)
        contents = Contents(0, {}, config_text, {"imported": folder.family.title})
        checkpoint = publish(unfinished, [part], contents, before_publish=lambda: None)
        (writing / "config.yaml").write_text(config_text, "utf-8")
        if folder.tokenizer_path is not None:
            shutil.copyfile(folder.tokenizer_path, writing / folder.tokenizer_path.name)
        if target.exists():
            target.rmdir()
        writing.rename(target)
    finally:
        shutil.rmtree(writing, ignore_errors=True)
    return out / checkpoint.relative_to(writing)


def _model_yaml(model: Mapping[str, Any]) -> str:
    """A `model:` section that a run's configuration can rest on."""
    import io

    from ruamel.yaml import YAML

    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    # The default, None, sorts; ruamel declares no type, so that a checker infers that only None is allowed.
    yaml.sort_base_mapping_type_on_output = False  # pyright: ignore[reportAttributeAccessIssue]
    stream = io.StringIO()
    yaml.dump({"model": dict(model)}, stream)
    return stream.getvalue()


def _size_bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+)\s*(|KB|MB|GB)", text.strip().upper())
    if match is None or int(match[1]) == 0:
        raise ConfigError(
            f"--max-shard-size {text}: must be a number of bytes, or one with KB, MB or GB such as 500MB."
        )
    return int(match[1]) * _UNITS[match[2]]


def _print_result(result: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(result, indent=1))
        return
    for key, value in result.items():
        if value is not None:
            shown = f"{value:,}" if isinstance(value, int) else f"{value:.2e}" if isinstance(value, float) else value
            typer.echo(f"{key.replace('_', ' ')}: {shown}")
