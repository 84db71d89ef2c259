"""A folder of a model's graphs: written, run and compared with the model, and only then given its name."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from llmtrain.config.model import ModelConfig
from llmtrain.errors import ConfigError
from llmtrain.interop.exported_model import ExportedModel
from llmtrain.interop.folder_files import MARKS, sha256_of
from llmtrain.interop.graphs.memory import GraphModel
from llmtrain.interop.graphs.ports import Graph, Port, Stages
from llmtrain.interop.graphs.proof import GraphComparison, OriginalModel, compare_graphs
from llmtrain.interop.proof import real_texts
from llmtrain.interop.text.proof import TextReader
from llmtrain.interop.text.tokenizer_json import text_frame, write_tokenizer

GraphFormat = Literal["onnx", "torch-export"]

_TYPES = {torch.int64: "int64", torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


@dataclass(frozen=True)
class GraphSettings:
    """What graphs are written as, and how far rounded weights may be from the trained ones."""

    form: GraphFormat
    precision: str = "float32"
    max_perplexity_increase: float = 0.02
    overwrite: bool = False


@dataclass(frozen=True)
class GraphExport:
    """What was found about graphs that were written, and notes on their tokenizer."""

    found: GraphComparison
    notes: list[str]


def require_graphs(model: ModelConfig) -> None:
    """Raise ConfigError for a model that has no graph of its own."""
    if model.moe is not None and model.moe.router == "expert_choice":
        raise ConfigError(
            "model.moe.router = expert_choice: each expert chooses among all tokens of a batch, so what a text gives "
            "depends on its neighbours and on what follows. A graph that goes on with a text cannot do that. Models "
            "with moe.router = top_k or switch can be exported."
        )


def prove(
    folder: Path,
    graphs: Sequence[Graph],
    stages: Stages,
    original: OriginalModel,
    trained: ExportedModel,
    settings: GraphSettings,
) -> GraphExport:
    """Compare what was written with the model, and write the tokenizer and the record that says how the graphs are used
    and what was proved."""
    model, found = trained.config, GraphComparison()
    ids, notes = _write_tokenizer(folder, trained)
    for precision, run in stages:
        found = compare_graphs(GraphModel(graphs, run), original, ids, precision)
        found.require(precision, settings.max_perplexity_increase)
    record = {
        "format": f"llmtrain {settings.form}",
        "family": model.family,
        "head": model.head,
        "precision": settings.precision,
        "max_seq_len": model.max_seq_len,
        "labels": list(model.labels) if model.labels else None,
        "padding": "before or behind a text" if graphs[-1].memory else "behind a text",
        "graphs": [_graph_record(folder, graph) for graph in graphs],
        "tokenizer": _tokenizer_record(trained),
        "proved": _proof_record(found),
    }
    (folder / MARKS[settings.form][0]).write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", "utf-8")
    (folder / "README.md").write_text(_readme(trained, settings, found), "utf-8")
    return GraphExport(found, notes)


def _write_tokenizer(folder: Path, trained: ExportedModel) -> tuple[list[int], list[str]]:
    """Write the tokenizer's files; returns the ids of real texts, once both tokenizers agree on them and on
    conversations, and notes."""
    notes = write_tokenizer(folder, trained.tokenizer, trained.tokens, trained.tokenizer_settings("llmtrain"))
    frame = text_frame(trained.tokenizer, trained.tokens, trained.config.family)
    reader = TextReader(folder, trained.tokenizer, frame)
    if trained.chats is not None:
        reader.compare_chats(trained.chats)
    return reader.compare(real_texts()), notes


def _graph_record(folder: Path, graph: Graph) -> dict[str, Any]:
    files = sorted(path for path in folder.iterdir() if path.name.startswith(f"{graph.name}."))
    return {
        "name": graph.name,
        "files": {path.name: sha256_of(path) for path in files},
        "inputs": [_port_record(port) for port in graph.inputs],
        "outputs": [_port_record(port) for port in graph.outputs],
    }


def _port_record(port: Port) -> dict[str, Any]:
    return {"name": port.name, "type": _TYPES[port.dtype], "dims": list(port.dims)}


def _tokenizer_record(trained: ExportedModel) -> dict[str, Any]:
    family, tokens = trained.config.family, trained.tokens
    before, behind = text_frame(trained.tokenizer, tokens, family)
    found: dict[str, Any] = {"file": "tokenizer.json", "before": list(before), "behind": list(behind)}
    if family != "encoder":
        found["end_ids"] = list(tokens.ends)
    if family == "encoder_decoder":
        found["start_id"] = tokens.start_id
    return found | {
        "mask_id": tokens.mask[1] if tokens.mask and family == "encoder" else None,
        "pad_id": tokens.pad[1] if tokens.pad else None,
    }


def _proof_record(found: GraphComparison) -> dict[str, Any]:
    return {
        "shapes": [list(shape) for shape in found.shapes],
        "positions": found.num_positions,
        "max_logit_difference": found.max_difference,
        "perplexity_increase": found.perplexity_increase,
        "best_equal": found.num_equal_best,
        "greedy_tokens_equal": found.num_greedy,
    }


def _readme(trained: ExportedModel, settings: GraphSettings, found: GraphComparison) -> str:
    facts = {**trained.facts, "Weights": settings.precision}
    rows = "\n".join(f"| {label} | {value} |" for label, value in facts.items())
    return f"""# A model as {settings.form}

Trained with llmtrain. `{MARKS[settings.form][0]}` names what goes in and comes out, the sizes, and the special tokens.

| | |
|---|---|
{rows}

## Checked

Before this folder was given its name, its graphs were run and compared with the trained model, over several numbers of
texts and tokens, and from the memory of earlier tokens:

- {found.num_positions:,} positions: logits differ by at most {found.max_difference:.2e}, the perplexity rises by
  {found.perplexity_increase:.2e} of itself;
- {found.num_equal_best:,} of them have the same likeliest token or label;
- {found.num_greedy} greedy tokens are equal.
"""
