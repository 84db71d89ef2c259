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
    given_parameters,
    print_result,
    require_unused,
    size_bytes,
)
from llmtrain.errors import ConfigError

if TYPE_CHECKING:
    from llmtrain.compress.pruning_plan import PruningSettings
    from llmtrain.compress.quantize import Compression
    from llmtrain.interop.hf_export import ExportSettings


class Scheme(StrEnum):
    """Bits of weights and of activations."""

    W8A16 = "w8a16"
    W8A8 = "w8a8"
    W4A16 = "w4a16"


class Part(StrEnum):
    """What pruning takes."""

    WEIGHTS = "weights"
    TWO_OF_FOUR = "2:4"
    HEADS = "heads"
    FFN = "ffn"
    LAYERS = "layers"


class Method(StrEnum):
    """How numbers, or what is pruned, are chosen."""

    RTN = "rtn"
    GPTQ = "gptq"
    MAGNITUDE = "magnitude"
    WANDA = "wanda"


METHODS = {"--scheme": (Method.RTN, Method.GPTQ), "--prune": (Method.MAGNITUDE, Method.WANDA)}
"""Of each way to compress; the first unless it is said."""

ONLY = {
    "--scheme": ("group", "dtype", "max_shard_size", "family", "proof", "proof_memory", "overwrite"),
    "--prune": ("sparsity",),
}
"""The options that have an effect in one way alone."""


class StayingType(StrEnum):
    """Type of what is not quantized."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


SchemeOption = Annotated[
    Scheme | None,
    typer.Option(
        help="Quantize: 8- or 4-bit weights; w8a8: what goes into them is rounded to 8 bits as well. Absent: what the "
        "run was trained for, with its group and what it keeps."
    ),
]
PruneOption = Annotated[
    Part | None,
    typer.Option(
        help="Instead: leave out heads, ffn (inner width) or layers, or make weights zero, with 2:4 two of every four."
    ),
]
SparsityOption = Annotated[float, typer.Option(min=0.001, max=0.999, help="--prune: the share that goes.")]
GroupOption = Annotated[
    int | None,
    typer.Option(min=0, max=1 << 24, help="Inputs that share a scale; 0: all. Absent: 128 for w4a16, else 0."),
]
MethodOption = Annotated[
    Method | None,
    typer.Option(
        help="--scheme: rtn rounds each weight by itself, gptq so that outputs change least. --prune: magnitude goes "
        "by weights alone, wanda by what a text makes of them. Absent: rtn, magnitude."
    ),
]
CalibrateOption = Annotated[
    str | None, typer.Option(help="gptq, wanda: shards or a text file; else the run's data.train.")
]
EvaluateOption = Annotated[
    str | None, typer.Option(help="Measure on these shards or this text file; else on the run's data.valid.")
]
KeepOption = Annotated[
    list[str] | None, typer.Option(help="Leave these as they are, such as mlp.down. May be given again.")
]
IncreaseOption = Annotated[
    float | None,
    typer.Option(
        min=0, max=1e6, help="Share by which it may grow; above it nothing is written. Absent: 0.02; --prune: any."
    ),
]
DtypeOption = Annotated[
    StayingType | None,
    typer.Option(help="Type of what stays, and of scales. Absent: bfloat16, or of a run with quantize its precision."),
]


def compress(
    context: typer.Context,
    source: Annotated[Path, typer.Argument(help="A run (its newest valid checkpoint), a checkpoint, or an export.")],
    out: OutArgument,
    scheme: SchemeOption = None,
    prune: PruneOption = None,
    sparsity: SparsityOption = 0.5,
    group: GroupOption = None,
    method: MethodOption = None,
    calibrate: CalibrateOption = None,
    evaluate: EvaluateOption = None,
    samples: Annotated[int, typer.Option(min=1, max=1_000_000, help="Samples of each that are used.")] = 128,
    keep: KeepOption = None,
    max_perplexity_increase: IncreaseOption = None,
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
    """Quantize a trained model as a folder in the form of compressed-tensors, which transformers and vLLM read; or
    prune it, as a run folder that other runs begin from (finetune.base) and that can be exported.

    The folder gets its name when it was read again and computes what it should (quantized: in transformers, where
    compressed-tensors is installed), and its perplexity was measured. One layer's weights are in memory at a time, but
    for a full proof.
    """
    from llmtrain.interop.installation import require_transformers

    chosen = _chosen(context, scheme, prune, method)
    require_transformers()
    from llmtrain.checkpoint.find import best_checkpoint
    from llmtrain.compress.pruning_plan import PruningSettings
    from llmtrain.compress.quantize import Compression
    from llmtrain.interop.hf_export import ExportSettings

    kept, bound = tuple(keep or ()), max_perplexity_increase
    model = (best_checkpoint(source) if best else source, tokenizer)
    if prune is not None:
        text = (calibrate, evaluate, samples)
        _prune(model, out, PruningSettings(prune.value, sparsity, chosen.value, kept, *text, bound), as_json)
        return
    settings = ExportSettings(
        max_shard_bytes=size_bytes("--max-shard-size", max_shard_size),
        overwrite=overwrite,
        family=family,
        proof=proof.value,
        proof_bytes=size_bytes("--proof-memory", proof_memory),
    )
    named, bound = scheme.value if scheme else None, 0.02 if bound is None else bound
    asked = Compression(named, group, chosen.value, kept, calibrate, evaluate, samples, bound)
    _quantize(model, out, asked, settings, dtype.value if dtype else None, as_json)


def _chosen(context: typer.Context, scheme: Scheme | None, prune: Part | None, method: Method | None) -> Method:
    """The method. Raises ConfigError for both of the ways to compress, and for an option of the other one."""
    if scheme is not None and prune is not None:
        raise ConfigError("--scheme or --prune: one of them, not both. Prune first, and quantize what is written.")
    way, other, why = (
        ("--scheme", "--prune", "without it") if prune is None else ("--prune", "--scheme", "with --prune")
    )
    for name in ONLY[other]:
        if name in given_parameters(context):
            raise ConfigError(f"--{name.replace('_', '-')}: goes with {other}, and has no effect {why}.")
    if method is not None and method not in METHODS[way]:
        raise ConfigError(f"--method {method.value}: goes with {other}. Of {way} try {' or '.join(METHODS[way])}.")
    return method or METHODS[way][0]


def _prune(source: tuple[Path, Path | None], out: Path, asked: "PruningSettings", as_json: bool) -> None:
    from llmtrain.compress.prune import prune
    from llmtrain.compress.source import open_source
    from llmtrain.runs.file_system import require_place

    require_unused(out)
    require_place(out)
    opened = open_source(*source)
    done = prune(opened, out, asked, lambda text: typer.echo(text, err=True))
    print_result(
        {
            "folder": str(out),
            "source": str(opened.path),
            "checkpoint": str(done.checkpoint),
            "config": str(out / "config.yaml"),
            "pruned": asked.kind,
            "method": asked.method,
            "parameters_before": done.parameters_before,
            "parameters": done.parameters,
            "share_of_zeros": done.zeros,
            "perplexity_before": done.before,
            "perplexity_after": done.after,
            "max_logit_difference": done.max_difference,
            "notes": list(done.notes),
        },
        as_json,
    )


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

    if out.resolve() == source[0].resolve():
        raise ConfigError(f"{out}: is the model that is to be compressed. Choose another folder.")
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
