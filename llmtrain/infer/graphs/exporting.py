"""A trained model to a folder of graphs: ONNX files, or programs of torch.export."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from llmtrain.checkpoint.reader import CheckpointReader
from llmtrain.checkpoint.saved_run import saved_architecture, saved_finetune
from llmtrain.config.finetune import FinetuneConfig
from llmtrain.errors import ConfigError
from llmtrain.finetune.rounded_weights import computed_weights
from llmtrain.infer.batching.request import Request
from llmtrain.infer.batching.sampling import Sampling
from llmtrain.infer.embedding import embedding
from llmtrain.infer.generate import iter_tokens
from llmtrain.infer.graphs.model_graphs import model_graphs
from llmtrain.infer.hugging_face import merged, open_trained
from llmtrain.infer.model import build_trained, logits_of
from llmtrain.interop.folder_files import require_free, written
from llmtrain.interop.graphs.folder import GraphExport, GraphSettings, prove, require_graphs
from llmtrain.interop.graphs.ports import Graph, Stages
from llmtrain.interop.graphs.proof import OriginalModel
from llmtrain.models.transformer import Transformer

WriteGraphs = Callable[[Path, Sequence[Graph], str], Stages]
"""Writes graphs into a folder, whose weights are of a type in the end."""

_CPU = torch.device("cpu")


def export_graphs(
    source: Path, out: Path, tokenizer: Path | None, settings: GraphSettings, write: WriteGraphs
) -> tuple[CheckpointReader, GraphExport]:
    """Write the checkpoint that a path means as graphs, and prove them.

    Raises as `open_trained` does; ConfigError for what has no graph; ExportError where the graphs are another model.
    Nothing is left then.
    """
    require_free(out, settings.overwrite, settings.form)
    checkpoint, trained = open_trained(source, tokenizer)
    require_graphs(trained.config)
    model, start_id = _built(checkpoint), trained.tokens.start_id
    original = OriginalModel(
        trained.config, partial(logits_of, model), partial(_continued, model, start_id), partial(embedding, model),
        start_id,
    )  # fmt: skip
    with written(out) as folder:
        graphs = model_graphs(_built(checkpoint, settings.precision))
        stages = write(folder, graphs, settings.precision)
        return checkpoint, prove(folder, graphs, stages, original, trained, settings)


def _built(checkpoint: CheckpointReader, precision: str = "float32") -> Transformer:
    """The model with what finetuning has added; low-rank updates are added to the weights. Integers come later."""
    finetune = saved_finetune(checkpoint)
    if finetune is not None and finetune.method == "prompt":
        raise ConfigError(
            f"{checkpoint.path}: was trained with finetune.method = prompt, whose embeddings stand in place of a "
            "text's first tokens. A graph reads tokens alone. Try --to peft."
        )
    config = saved_architecture(checkpoint)
    bottlenecks: FinetuneConfig | None = None
    if finetune is not None and finetune.method == "adapter":
        bottlenecks = finetune
        model = build_trained(config, computed_weights(checkpoint, config), _CPU, bottlenecks)
    else:
        model = build_trained(config, merged(checkpoint, config), _CPU)
    dtype = {"float16": torch.float16, "bfloat16": torch.bfloat16}.get(precision, torch.float32)
    return model.requires_grad_(False).to(dtype)


def _continued(model: Transformer, start_id: int, ids: Sequence[int], count: int) -> list[int]:
    """As `llmtrain generate` goes on with ids, past the ends of texts too."""
    encodes = model.config.family == "encoder_decoder"
    prompt, source = ((start_id,), tuple(ids)) if encodes else (tuple(ids), ())
    return list(iter_tokens(model, Request(prompt, count, Sampling(0.0), frozenset(), source=source)))
