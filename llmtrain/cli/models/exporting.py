"""`llmtrain export`: trained models as Hugging Face folders, adapters, GGUF files and graphs."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmtrain.cli.models.formats import ADAPTERS, GRAPHS, Format, Precision, require_use
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
    size_bytes,
)

if TYPE_CHECKING:
    from llmtrain.interop.hf_export import ExportSettings

FormatOption = Annotated[
    Format,
    typer.Option(
        help="hf: a folder that transformers loads. gguf: a file for llama.cpp. peft, adapterhub: what finetuning has "
        "added to its base. onnx, torch-export: graphs that run without llmtrain."
    ),
]
PrecisionOption = Annotated[Precision, typer.Option(help="Type of the weights; q8_0: gguf; int8, int4: onnx.")]
RoundingOption = Annotated[
    float, typer.Option(min=0, max=1e6, help="hf: share of merged low-rank updates that --dtype may round away.")
]
PerplexityOption = Annotated[
    float, typer.Option(min=0, max=1e6, help="gguf, onnx, torch-export: share of the perplexity that --dtype may add.")
]
BaseOption = Annotated[str | None, typer.Option(help="peft, adapterhub: name or folder of the base, for who loads it.")]


@dataclass(frozen=True)
class _Request:
    """What every format is asked."""

    source: Path
    out: Path
    to: Format
    dtype: Precision
    tokenizer: Path | None
    family: str | None
    overwrite: bool


def export(
    context: typer.Context,
    source: Annotated[Path, typer.Argument(help="A run (its newest valid checkpoint) or a checkpoint.")],
    out: OutArgument,
    to: FormatOption = Format.HF,
    dtype: PrecisionOption = Precision.FLOAT32,
    max_shard_size: ShardSizeOption = "5GB",
    tokenizer: TokenizerOption = None,
    family: FamilyOption = None,
    proof: ProofOption = ProofKind.AUTO,
    proof_memory: ProofMemoryOption = "16GB",
    overwrite: OverwriteOption = False,
    best: BestOption = False,
    max_rounding: RoundingOption = 0.1,
    max_perplexity_increase: PerplexityOption = 0.02,
    base: BaseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write a trained model as a Hugging Face folder, and prove that transformers computes the same from it.

    Weights are read and written some at a time: memory is that of the largest file, and of the proof.
    With --to gguf: write a file for llama.cpp, and prove it there where the extra gguf is installed.
    With --to peft: write the low-rank updates or the soft prompt of a finetuning as a folder that PEFT loads; with
    --to adapterhub bottleneck adapters as one that the library adapters loads. With --to onnx (llmtrain[onnx]) or
    torch-export: write graphs, and prove that onnxruntime or PyTorch computes the same from them without llmtrain.
    """
    from llmtrain.interop.installation import require_transformers

    require_transformers()
    from llmtrain.checkpoint.find import best_checkpoint
    from llmtrain.interop.folder_files import require_free
    from llmtrain.interop.hf_export import ExportSettings
    from llmtrain.runs.file_system import require_place

    given = given_parameters(context)
    require_use(to, dtype, given)
    shard_bytes = size_bytes("--max-shard-size", max_shard_size)
    proof_bytes = size_bytes("--proof-memory", proof_memory)
    require_free(out, overwrite, to.value)
    require_place(out)
    request = _Request(best_checkpoint(source) if best else source, out, to, dtype, tokenizer, family, overwrite)
    if to is Format.GGUF:
        told = _gguf(request, max_perplexity_increase)
    elif to in GRAPHS:
        told = _graphs(request, max_perplexity_increase)
    elif to in ADAPTERS:
        told = _adapter(request, base)
    else:
        settings = ExportSettings(
            dtype=dtype.value,
            max_shard_bytes=shard_bytes,
            overwrite=overwrite,
            family=family,
            proof=proof.value,
            proof_bytes=proof_bytes,
            max_rounding=max_rounding,
        )
        told = _hugging_face(request, settings)
    print_result({"format": to.value} | told, as_json)


def _hugging_face(request: _Request, settings: "ExportSettings") -> dict[str, Any]:
    from llmtrain.infer.hugging_face import export_checkpoint, rounding_notes

    checkpoint, export = export_checkpoint(request.source, request.out, request.tokenizer, settings)
    proof = export.proof
    return {
        "folder": str(request.out),
        "checkpoint": str(checkpoint.path),
        "family": export.family,
        "dtype": request.dtype.value,
        "proof": "the whole model" if proof.num_parts == 1 else f"{proof.num_parts} parts, some layers in each",
        "max_logit_difference": proof.max_difference,
        "logit_positions_compared": proof.num_tokens,
        "greedy_tokens_equal": proof.num_greedy_tokens,
        "text_characters_equal": proof.num_text_characters,
        **({"conversations_equal": proof.num_chats} if proof.num_chats else {}),
        "notes": [*export.notes, *rounding_notes(checkpoint)],
    }


def _gguf(request: _Request, max_perplexity_increase: float) -> dict[str, Any]:
    from llmtrain.infer.gguf import export_gguf
    from llmtrain.infer.hugging_face import rounding_notes
    from llmtrain.interop.gguf.export import GgufSettings
    from llmtrain.interop.gguf.file_format import TensorType

    types = {Precision.FLOAT32: TensorType.F32, Precision.FLOAT16: TensorType.F16, Precision.Q8_0: TensorType.Q8_0}
    settings = GgufSettings(
        types[request.dtype], max_perplexity_increase, overwrite=request.overwrite, family=request.family
    )
    checkpoint, export = export_gguf(request.source, request.out, request.tokenizer, settings)
    proof = export.proof
    missing = "not proved: llama.cpp is not installed. Run pip install 'llmtrain[gguf]', and export again"
    proved: dict[str, Any] = {"proof": missing}
    if proof is not None:
        proved = {
            "proof": f"llama.cpp ({proof.version})",
            "max_log_likelihood_difference": proof.max_difference,
            "likelihoods_compared": proof.num_likelihoods,
            **({"likelihoods_of_other_experts": proof.num_tipped} if proof.num_tipped else {}),
            "greedy_tokens_equal": proof.num_greedy_tokens,
            "text_characters_equal": proof.num_text_characters,
            **({"conversations_equal": proof.num_chats} if proof.num_chats else {}),
        }
    return {
        "file": str(request.out / export.file),
        "checkpoint": str(checkpoint.path),
        "architecture": export.architecture,
        "dtype": request.dtype.value,
        "perplexity_trained": export.perplexities[0],
        "perplexity_written": export.perplexities[1],
        **proved,
        "notes": [*export.notes, *rounding_notes(checkpoint)],
    }


def _graphs(request: _Request, max_perplexity_increase: float) -> dict[str, Any]:
    from llmtrain.infer.graphs.exporting import export_graphs
    from llmtrain.infer.hugging_face import rounding_notes
    from llmtrain.interop.graphs.folder import GraphSettings
    from llmtrain.interop.graphs.torch_programs import write_programs
    from llmtrain.interop.installation import require_onnx

    form, write = "torch-export", write_programs
    if request.to is Format.ONNX:
        require_onnx()
        from llmtrain.interop.onnx_folder.writing import write_onnx

        form, write = "onnx", write_onnx
    settings = GraphSettings(form, request.dtype.value, max_perplexity_increase, request.overwrite)
    checkpoint, export = export_graphs(request.source, request.out, request.tokenizer, settings, write)
    found = export.found
    return {
        "folder": str(request.out),
        "checkpoint": str(checkpoint.path),
        "dtype": request.dtype.value,
        "max_logit_difference": found.max_difference,
        "perplexity_increase": found.perplexity_increase,
        "logit_positions_compared": found.num_positions,
        "best_equal": found.num_equal_best,
        "greedy_tokens_equal": found.num_greedy,
        "notes": [*export.notes, *rounding_notes(checkpoint)],
    }


def _adapter(request: _Request, base: str | None) -> dict[str, Any]:
    """`base` is the base's name, for who loads the folder."""
    from llmtrain.infer.adapters import export_adapter
    from llmtrain.infer.hugging_face import rounding_notes
    from llmtrain.interop.hf_export import DTYPES
    from llmtrain.interop.peft.writing import PeftSettings

    form = "peft" if request.to is Format.PEFT else "adapterhub"
    settings = PeftSettings(DTYPES[request.dtype.value], base)
    no_base = "names no base: give --base, or load the base and this folder by hand"
    checkpoint, export = export_adapter(request.source, request.out, form, settings, request.overwrite, request.family)
    return {
        "folder": str(request.out),
        "checkpoint": str(checkpoint.path),
        "family": export.family,
        "dtype": request.dtype.value,
        "max_relative_difference_read_again": export.max_difference,
        "notes": [*([] if base else [no_base]), *rounding_notes(checkpoint, to_base=True)],
    }
