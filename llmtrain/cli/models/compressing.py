"""`llmtrain compress`: a trained model made smaller, and measured before and after."""

from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmtrain.cli.models.options import (
    BestOption,
    FamilyOption,
    JsonOption,
    OutArgument,
    OverwriteOption,
    ProofKind,
    ProofMemoryOption,
    ProofOption,
    ShardSizeOption,
    TokenizerOption,
    print_result,
    size_bytes,
)

if TYPE_CHECKING:
    from llmtrain.compress.quantize import Compression
    from llmtrain.interop.hf_export import ExportSettings


class Scheme(StrEnum):
    """Bits of weights and of activations."""

    W8A16 = "w8a16"
    W8A8 = "w8a8"
    W4A16 = "w4a16"


class Method(StrEnum):
    """How numbers are chosen."""

    RTN = "rtn"
    GPTQ = "gptq"


class StayingType(StrEnum):
    """Type of what is not quantized."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


SchemeOption = Annotated[
    Scheme | None,
    typer.Option(
        help="8- or 4-bit weights; w8a8: what goes into them is rounded to 8 bits as well. Absent: what the run was "
        "trained for, with its group and what it keeps."
    ),
]
GroupOption = Annotated[
    int | None,
    typer.Option(min=0, max=1 << 24, help="Inputs that share a scale; 0: all. Absent: 128 for w4a16, else 0."),
]
MethodOption = Annotated[
    Method, typer.Option(help="rtn: each weight is rounded by itself. gptq: so that outputs change least.")
]
CalibrateOption = Annotated[str | None, typer.Option(help="gptq: shards or a text file; else the run's data.train.")]
EvaluateOption = Annotated[
    str | None, typer.Option(help="Measure on these shards or this text file; else on the run's data.valid.")
]
KeepOption = Annotated[
    list[str] | None, typer.Option(help="Leave these as they are, such as mlp.down. May be given again.")
]
IncreaseOption = Annotated[
    float, typer.Option(min=0, max=1e6, help="Share by which it may grow; above it nothing is written.")
]
DtypeOption = Annotated[
    StayingType | None,
    typer.Option(help="Type of what stays, and of scales. Absent: bfloat16, or of a run with quantize its precision."),
]


def compress(
    source: Annotated[Path, typer.Argument(help="A run (its newest valid checkpoint), a checkpoint, or an export.")],
    out: OutArgument,
    scheme: SchemeOption = None,
    group: GroupOption = None,
    method: MethodOption = Method.RTN,
    calibrate: CalibrateOption = None,
    evaluate: EvaluateOption = None,
    samples: Annotated[int, typer.Option(min=1, max=1_000_000, help="Samples of each that are used.")] = 128,
    keep: KeepOption = None,
    max_perplexity_increase: IncreaseOption = 0.02,
    dtype: DtypeOption = None,
    max_shard_size: ShardSizeOption = "5GB",
    tokenizer: TokenizerOption = None,
    family: FamilyOption = None,
    proof: ProofOption = ProofKind.AUTO,
    proof_memory: ProofMemoryOption = "16GB",
    overwrite: OverwriteOption = False,
    best: BestOption = False,
    as_json: JsonOption = False,
) -> None:
    """Quantize a trained model, and write it as a folder in the form of compressed-tensors, which transformers and vLLM
    read.

    It gets its name when it was read again, computes the same in transformers (where compressed-tensors is installed),
    and its perplexity has not grown too much. One layer's weights are in memory at a time, but for the proof.
    """
    from llmtrain.interop.installation import require_transformers

    require_transformers()
    from llmtrain.checkpoint.find import best_checkpoint
    from llmtrain.compress.quantize import Compression
    from llmtrain.interop.hf_export import ExportSettings

    settings = ExportSettings(
        max_shard_bytes=size_bytes("--max-shard-size", max_shard_size),
        overwrite=overwrite,
        family=family,
        proof=proof.value,
        proof_bytes=size_bytes("--proof-memory", proof_memory),
    )
    kept = tuple(keep or ())
    named = scheme.value if scheme else None
    asked = Compression(named, group, method.value, kept, calibrate, evaluate, samples, max_perplexity_increase)
    opened = (best_checkpoint(source) if best else source, tokenizer)
    _quantize(opened, out, asked, settings, dtype.value if dtype else None, as_json)


def _quantize(
    source: tuple[Path, Path | None],
    out: Path,
    asked: "Compression",
    settings: "ExportSettings",
    dtype: str | None,
    as_json: bool,
) -> None:
    """`source` is a model and the tokenizer that was named."""
    from llmtrain.compress.quantize import compress as quantize
    from llmtrain.compress.source import open_source
    from llmtrain.interop.folder_files import require_free
    from llmtrain.runs.file_system import require_place

    require_free(out, settings.overwrite, "hf")
    require_place(out)
    opened = open_source(*source)
    settings = replace(settings, dtype=dtype or opened.dtype)
    done = quantize(opened, out, asked, settings, lambda text: typer.echo(text, err=True))
    found = done.export.proof
    compared = {"max_logit_difference": found.max_difference, "logit_positions_compared": found.num_tokens}
    unread = f"not compared in transformers: {found.unread}. pip install compressed-tensors, and compress again"
    print_result(
        {
            "folder": str(out),
            "source": str(opened.path),
            "family": done.export.family,
            "scheme": done.scheme,
            "method": asked.method,
            "form": done.form,
            "matrices": done.num_quantized,
            "perplexity_before": done.before,
            "perplexity_after": done.after,
            **({} if found.unread else compared),
            "notes": [*([unread] if found.unread else []), *done.export.notes],
        },
        as_json,
    )
