"""Options of the verbs that read trained models, and what those print."""

import json
import re
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from llmtrain.errors import ConfigError

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


class ProofKind(StrEnum):
    """How a Hugging Face folder is compared with the trained model."""

    AUTO = "auto"
    FULL = "full"
    LAYERS = "layers"


class KernelKind(StrEnum):
    """How the matrices of a quantized model are multiplied."""

    AUTO = "auto"
    PACKED = "packed"
    PLAIN = "plain"


RanksArgument = Annotated[
    list[str] | None,
    typer.Argument(help="Ranks that hold the model, such as parallel.tensor=2.", metavar="KEY=VALUE"),
]
OutArgument = Annotated[Path, typer.Argument(help="Folder to write.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
BestOption = Annotated[bool, typer.Option("--best", help="Of a run's checkpoints the best one by evaluate.metric.")]
BaseFolderOption = Annotated[
    Path | None,
    typer.Option("--base", help="Of a PEFT folder: its base. Of a run: where its base lies now, if that was moved."),
]
KernelsOption = Annotated[
    KernelKind,
    typer.Option(
        help="Of a quantized model, on a CPU: packed keeps matrices in whole numbers, plain dequantizes them, auto "
        "keeps those that are multiplied faster so."
    ),
]
TokenizerOption = Annotated[Path | None, typer.Option(help="Instead of the one beside the model.")]
FamilyOption = Annotated[str | None, typer.Option(help="transformers' model_type, where several would do.")]
ShardSizeOption = Annotated[str, typer.Option(help="Largest weight file, such as 500MB.")]
ProofOption = Annotated[
    ProofKind,
    typer.Option(help="full: both models in memory. layers: some layers at a time. auto: full where it fits."),
]
ProofMemoryOption = Annotated[str, typer.Option(help="Memory that a full proof may take with auto.")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export.")]


def given_parameters(context: typer.Context) -> list[str]:
    """The names of the parameters that stand on the command line."""
    return [name for name in context.params if str(context.get_parameter_source(name)).endswith("COMMANDLINE")]


def require_unused(out: Path) -> None:
    """Raise ConfigError for a folder that holds something."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out}: exists already. Choose another name, or remove it.")


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
            typer.echo(f"{key.replace('_', ' ')}: {_shown(value)}")


def _shown(value: Any) -> Any:
    """Perplexities and shares plainly; errors, which are small, and what is huge with a power of ten."""
    if isinstance(value, int):
        return f"{value:,}"
    if not isinstance(value, float):
        return value
    if value == 0:
        return "0"
    return f"{value:.4f}" if 0.001 <= abs(value) < 1e6 else f"{value:.2e}"
