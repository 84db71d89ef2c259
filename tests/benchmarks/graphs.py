"""A model's graph in onnxruntime: a step of decoding beside PyTorch, plain and compiled, at batch 1 and 8."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from llmtrain.infer.graphs.model_graphs import model_graphs
from llmtrain.infer.model import load_model
from llmtrain.interop.graphs.memory import GraphModel
from llmtrain.interop.graphs.ports import Graph, Run
from llmtrain.models.compiled_graphs import guard_compiled_graphs
from llmtrain.models.transformer import Transformer
from tests.benchmarks.measuring import Measurement, Options, Table, measure, one_core
from tests.benchmarks.peer_models import Shape
from tests.benchmarks.serving import LARGE, QUICK, SMALL, Model, batch_speed, write_model
from tests.benchmarks.step import clock
from tests.support.readers import use_onnx

PRECISIONS = ("float32", "int8", "int4")
IN_ORT = "onnxruntime, float32"
PROMPT = 32


def benchmark(options: Options) -> list[Table]:
    """In one thread on a CPU: milliseconds of the processor for one more token of each text, from a memory."""
    use_onnx()
    from llmtrain.interop.onnx_folder.writing import write_onnx

    tables = []
    with one_core(), TemporaryDirectory() as place:
        for shape in (QUICK,) if options.quick else (SMALL, LARGE):
            source = write_model(shape, Path(place, f"{shape.hidden_size}"))
            runs: dict[str, GraphModel] = {}
            for precision in PRECISIONS:
                graphs = model_graphs(loaded(source))
                folder = Path(place, f"{shape.hidden_size}-{precision}")
                folder.mkdir()
                *_, (_, run) = write_onnx(folder, graphs, precision)
                runs[f"onnxruntime, {precision}"] = GraphModel(graphs, run)
            graphs = model_graphs(loaded(source))
            runs["the graph in PyTorch"] = GraphModel(graphs, in_pytorch(graphs, compiled=False))
            runs["the graph in PyTorch, compiled"] = GraphModel(graphs, in_pytorch(graphs, compiled=True))
            tables += [table(source, shape, runs, batch, options.rounds) for batch in (1, 8)]
    return tables


def loaded(folder: Path) -> Transformer:
    return load_model(folder, torch.device("cpu")).model


def table(folder: Path, shape: Shape, runs: dict[str, GraphModel], batch: int, rounds: int) -> Table:
    new = shape.seq_len // 4
    contenders: dict[str, Measurement] = {
        name: partial(milliseconds, model, batch, min(PROMPT, new), new) for name, model in runs.items()
    }
    model = Model(folder, None, [(1,)] * batch, new, loaded(folder))
    contenders["llmtrain generate"] = lambda: 1000 * batch / batch_speed(model, batch, exact=False)
    sizes = f"{shape.num_layers} layers, {shape.hidden_size} wide, {new} new tokens"
    rows = measure(contenders, rounds)
    return Table(f"One more token of each of {batch} texts ({sizes})", "ms", "lower", IN_ORT, rows)


def in_pytorch(graphs: Sequence[Graph], compiled: bool) -> Run:
    """The modules that the graphs are made from."""
    if compiled:
        guard_compiled_graphs()
    modules = {graph.name: torch.compile(graph.module, dynamic=True) if compiled else graph.module for graph in graphs}

    @torch.no_grad()
    def run(graph: Graph, inputs: Sequence[Tensor]) -> list[Tensor]:
        return list(modules[graph.name](*inputs))

    return run


def milliseconds(model: GraphModel, batch: int, prompt: int, new: int) -> float:
    """For one step of decoding behind a prompt, the reading of it left out."""
    now = clock(torch.device("cpu"))
    logits, memory = model.begin([list(range(5, 5 + prompt))] * batch)
    begin = now()
    for _ in range(new):
        logits = memory.extend(logits[:, -1:].argmax(-1))
    return 1000 * (now() - begin) / new
