"""`llmtrain export` and `import`: trained models to and from Hugging Face folders and GGUF files."""

import json
import re
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmtrain.errors import ConfigError

if TYPE_CHECKING:
    from llmtrain.interop.hf_export import Export


_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
RanksArgument = Annotated[
    list[str] | None,
    typer.Argument(help="Ranks that hold the model, such as parallel.tensor=2.", metavar="KEY=VALUE"),
]
BestOption = Annotated[bool, typer.Option("--best", help="Of a run's checkpoints the best one by evaluate.metric.")]


BaseFolderOption = Annotated[
    Path | None,
    typer.Option("--base", help="Of a PEFT folder: its base. Of a run: where its base lies now, if that was moved."),
]


class Format(StrEnum):
    """What a model is written as."""

    HF = "hf"
    PEFT = "peft"
    ADAPTERHUB = "adapterhub"
    GGUF = "gguf"


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
    Q8_0 = "q8_0"


FormatOption = Annotated[
    Format,
    typer.Option(
        help="hf: a folder that transformers loads. gguf: a file for llama.cpp. peft, adapterhub: what finetuning has "
        "added to its base."
    ),
]
RoundingOption = Annotated[
    float, typer.Option(min=0, max=1e6, help="Share of merged low-rank updates that rounding to --dtype may change.")
]
PerplexityOption = Annotated[
    float, typer.Option(min=0, max=1e6, help="gguf: share of the perplexity that storing in --dtype may add.")
]
BaseOption = Annotated[str | None, typer.Option(help="peft, adapterhub: name or folder of the base, for who loads it.")]


def export(
    source: Annotated[Path, typer.Argument(help="A run (its newest valid checkpoint) or a checkpoint.")],
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    to: FormatOption = Format.HF,
    dtype: Annotated[Precision, typer.Option(help="Type of the weights; q8_0: of gguf.")] = Precision.FLOAT32,
    max_shard_size: Annotated[str, typer.Option(help="Largest weight file, such as 500MB.")] = "5GB",
    tokenizer: Annotated[Path | None, typer.Option(help="Instead of the one beside the checkpoints.")] = None,
    family: Annotated[str | None, typer.Option(help="transformers' model_type, where several would do.")] = None,
    proof: Annotated[
        ProofKind,
        typer.Option(help="full: both models in memory. layers: some layers at a time. auto: full where it fits."),
    ] = ProofKind.AUTO,
    proof_memory: Annotated[str, typer.Option(help="Memory that a full proof may take with auto.")] = "16GB",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export.")] = False,
    best: BestOption = False,
    max_rounding: RoundingOption = 0.1,
    max_perplexity_increase: PerplexityOption = 0.02,
    base: BaseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write a trained model as a Hugging Face folder, and prove that transformers computes the same from it.

    Weights are read and written some at a time: memory is that of the largest file, and of the proof.
    With --to gguf: write a file for llama.cpp, and prove it there where that is installed (llmtrain[gguf]).
    With --to peft: write the low-rank updates or the soft prompt of a finetuning as a folder that PEFT loads; with
    --to adapterhub bottleneck adapters as one that the library adapters loads.
    """
    from llmtrain.interop.installation import require_transformers

    require_transformers()
    from llmtrain.checkpoint.find import best_checkpoint
    from llmtrain.infer.hugging_face import export_checkpoint
    from llmtrain.interop.hf_export import ExportSettings, require_free
    from llmtrain.runs.file_system import require_place

    _require_use(to, dtype, base, {"--tokenizer": tokenizer is not None, "--proof": proof is not ProofKind.AUTO})
    if to is Format.GGUF:
        _export_gguf((source, best), out, tokenizer, dtype, (max_perplexity_increase, overwrite, family), as_json)
        return
    if to is not Format.HF:
        source = best_checkpoint(source) if best else source
        _export_adapter(source, out, to, (dtype, base), (overwrite, family), as_json)
        return
    proof_bytes = size_bytes("--proof-memory", proof_memory)
    require_free(out, overwrite)
    require_place(out)
    settings = ExportSettings(
        dtype=dtype.value,
        max_shard_bytes=size_bytes("--max-shard-size", max_shard_size),
        overwrite=overwrite,
        family=family,
        proof=proof.value,
        proof_bytes=proof_bytes,
        max_rounding=max_rounding,
    )
    source = best_checkpoint(source) if best else source
    checkpoint, export = export_checkpoint(source, out, tokenizer, settings)
    print_result(
        {"format": to.value, "folder": str(out), "checkpoint": str(checkpoint.path)} | _told(export, dtype), as_json
    )


def _require_use(to: Format, dtype: Precision, base: str | None, only_hf: Mapping[str, bool]) -> None:
    """Raise ConfigError for an option that was given, and has nothing to say about what is written."""
    if (to is Format.GGUF and dtype is Precision.BFLOAT16) or (to is not Format.GGUF and dtype is Precision.Q8_0):
        allowed = "float32, float16 or q8_0" if to is Format.GGUF else "float32, bfloat16 or float16"
        raise ConfigError(f"--dtype {dtype.value}: must be {allowed} with --to {to.value}.")
    if to in (Format.HF, Format.GGUF) and base is not None:
        raise ConfigError("--base: names the base of an adapter, and goes with --to peft and --to adapterhub.")
    for name, is_given in only_hf.items():
        if is_given and to is not Format.HF and not (to is Format.GGUF and name == "--tokenizer"):
            raise ConfigError(f"{name}: goes with --to hf; --to {to.value} has no such thing.")


def _export_gguf(
    source: tuple[Path, bool],
    out: Path,
    tokenizer: Path | None,
    dtype: Precision,
    settings: tuple[float, bool, str | None],
    as_json: bool,
) -> None:
    """`source` is the path and whether its best checkpoint is meant; `settings` are the bound on the perplexity,
    overwrite and family."""
    from llmtrain.checkpoint.find import best_checkpoint
    from llmtrain.infer.gguf import export_gguf
    from llmtrain.interop.gguf.export import GgufSettings, require_free_gguf
    from llmtrain.interop.gguf.file_format import TensorType
    from llmtrain.runs.file_system import require_place

    bound, overwrite, family = settings
    require_free_gguf(out, overwrite)
    require_place(out)
    types = {Precision.FLOAT32: TensorType.F32, Precision.FLOAT16: TensorType.F16, Precision.Q8_0: TensorType.Q8_0}
    wanted = GgufSettings(types[dtype], bound, overwrite=overwrite, family=family)
    path, best = source
    checkpoint, export = export_gguf(best_checkpoint(path) if best else path, out, tokenizer, wanted)
    proof = export.proof
    missing = "not proved: llama.cpp is not installed. Run pip install 'llmtrain[gguf]', and export again"
    proved: dict[str, Any] = {"proof": missing}
    if proof is not None:
        proved = {
            "proof": f"llama.cpp ({proof.version})",
            "max_log_likelihood_difference": proof.max_difference,
            "likelihoods_compared": proof.num_likelihoods,
            "greedy_tokens_equal": proof.num_greedy_tokens,
            "text_characters_equal": proof.num_text_characters,
            **({"conversations_equal": proof.num_chats} if proof.num_chats else {}),
        }
    told = {"format": "gguf", "file": str(out / export.file), "checkpoint": str(checkpoint.path)}
    told |= {"architecture": export.architecture, "dtype": dtype.value}
    told |= {"perplexity_trained": export.perplexities[0], "perplexity_written": export.perplexities[1]}
    print_result({**told, **proved, "notes": export.notes}, as_json)


def _export_adapter(
    source: Path,
    out: Path,
    to: Format,
    content: tuple[Precision, str | None],
    settings: tuple[bool, str | None],
    as_json: bool,
) -> None:
    """`content` is the type of the tensors and the base's name, `settings` are overwrite and family."""
    from llmtrain.infer.adapters import export_adapter
    from llmtrain.interop.hf_export import DTYPES
    from llmtrain.interop.peft.writing import PeftSettings
    from llmtrain.runs.file_system import require_place

    require_place(out)
    dtype, base = content
    form = "peft" if to is Format.PEFT else "adapterhub"
    checkpoint, export = export_adapter(source, out, form, PeftSettings(DTYPES[dtype.value], base), *settings)
    print_result(
        {
            "format": to.value,
            "folder": str(out),
            "checkpoint": str(checkpoint.path),
            "family": export.family,
            "dtype": dtype.value,
            "max_relative_difference_read_again": export.max_difference,
            "notes": [] if base else ["names no base: give --base, or load the base and this folder by hand"],
        },
        as_json,
    )


def _told(export: "Export", dtype: Precision) -> dict[str, Any]:
    """The facts of an export: what was written, and what was proved."""
    proof = export.proof
    return {
        "family": export.family,
        "dtype": dtype.value,
        "proof": "the whole model" if proof.num_parts == 1 else f"{proof.num_parts} parts, some layers in each",
        "max_logit_difference": proof.max_difference,
        "logit_positions_compared": proof.num_tokens,
        "greedy_tokens_equal": proof.num_greedy_tokens,
        "text_characters_equal": proof.num_text_characters,
        **({"conversations_equal": proof.num_chats} if proof.num_chats else {}),
        "notes": export.notes,
    }


def import_(
    source: Annotated[Path, typer.Argument(help="A Hugging Face folder (config.json, safetensors), or FILE.gguf.")],
    out: Annotated[Path, typer.Argument(help="Folder to write; must not exist or be empty.")],
    base: Annotated[
        Path | None, typer.Option(help="Of an adapter's folder: the Hugging Face folder that it goes with.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Read a Hugging Face folder, a PEFT folder and its base, or a GGUF file (F32, F16, BF16, Q8_0) as a checkpoint of
    step 0, with its configuration and tokenizer beside it.

    Train from it with `base: OUT/config.yaml` and `checkpoint.resume=OUT`. Weights are read and written some at a time.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out}: exists already. Choose another name, or remove it.")
    from llmtrain.config.parameters import num_parameters
    from llmtrain.interop.installation import require_transformers
    from llmtrain.runs.file_system import require_place

    require_place(out)
    require_transformers()
    from llmtrain.infer.adapters import import_adapter
    from llmtrain.infer.gguf import gguf_file, import_gguf
    from llmtrain.infer.hugging_face import import_folder

    if (source / "adapter_config.json").is_file():
        imported = import_adapter(source, base, out)
    elif base is not None:
        raise ConfigError(f"--base: goes with an adapter's folder, and {source} holds no adapter_config.json.")
    elif (file := gguf_file(source)) is not None:
        imported = import_gguf(file, out)
    else:
        imported = import_folder(source, out)
    folder, found = imported.folder, imported.tokenizer
    print_result(
        {
            "folder": str(out),
            "checkpoint": str(imported.checkpoint),
            "config": str(out / "config.yaml"),
            "tokenizer": None if found.name is None else str(out / found.name),
            "family": folder.title,
            "parameters": num_parameters(folder.model),
            "notes": [*folder.notes, *found.notes],
        },
        as_json,
    )


def size_bytes(option: str, text: str) -> int:
    """Bytes of an option such as 500MB. Raises ConfigError."""
    match = re.fullmatch(r"(\d{1,15})\s*(|KB|MB|GB)", text.strip().upper())
    if match is None or int(match[1]) == 0:
        raise ConfigError(f"{option} {text}: must be a number of bytes, or one with KB, MB or GB such as 500MB.")
    return int(match[1]) * _UNITS[match[2]]


def print_result(result: Mapping[str, Any], as_json: bool) -> None:
    """What a command has done, for a reader or a program."""
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
