"""A graph as an ONNX file: the same bytes for the same weights, and nothing in it of the machine that made it."""

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx  # pyright: ignore[reportMissingImports]
import torch
from onnxscript import opset18 as op  # pyright: ignore[reportMissingImports]

from llmtrain.errors import ExportError
from llmtrain.interop.graphs.ports import Graph, Stages
from llmtrain.interop.onnx_folder.quantization import BITS, quantize
from llmtrain.interop.onnx_folder.sessions import OnnxSessions

LARGEST_FILE = 1_900_000_000
"""Bytes of weights in one file. Protobuf ends at 2 GB: more lie in a file of their own beside it."""

SCOPES = "pkg.torch.onnx.name_scopes"
"""Where the exporter says in which modules an operation stands."""


def write_onnx(folder: Path, graphs: Sequence[Graph], precision: str) -> Stages:
    """Write the graphs of a model, which onnxruntime runs. Raises ExportError."""
    exact = [_write_graph(folder / f"{graph.name}.onnx", graph) for graph in graphs]
    yield ("float32" if precision in BITS else precision), OnnxSessions(folder, graphs).run
    if precision in BITS:
        with _quiet():
            for graph, names in zip(graphs, exact, strict=True):
                quantize(folder / f"{graph.name}.onnx", precision, names, LARGEST_FILE)
        yield precision, OnnxSessions(folder, graphs).run


def _write_graph(path: Path, graph: Graph) -> list[str]:
    """Write NAME.onnx, and NAME.onnx.data where there are more weights than one file takes. Returns the names of the
    operations whose weights stay exact."""
    apart = sum(parameter.nbytes for parameter in graph.module.parameters()) > LARGEST_FILE
    with _quiet():
        try:
            made: Any = torch.onnx.export(
                graph.program(),
                dynamo=True,
                input_names=[port.name for port in graph.inputs],
                output_names=[port.name for port in graph.outputs],
                verbose=False,
                custom_translation_table={torch.ops.aten.sort.stable: _stable_sort},
            )
        except Exception as error:  # the exporter's steps raise errors of many kinds
            cause: BaseException = error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            raise ExportError(
                f"PyTorch {torch.__version__} cannot write {graph.name} as ONNX: {str(cause)[:300]}. "
                "Nothing is left of the folder. Try another version of PyTorch, or --to torch-export."
            ) from error
        made.save(str(path), external_data=apart)
    return _strip(path, graph)


def _stable_sort(x: Any, *, stable: bool, dim: int = -1, descending: bool = False) -> tuple[Any, Any]:
    """What routes tokens to experts, which PyTorch's exporter knows only where ties do not matter. ONNX has them sorted
    by their places always: https://onnx.ai/onnx/operators/onnx__TopK.html."""
    size = op.Reshape(op.Gather(op.Shape(x), op.Constant(value_int=dim), axis=0), op.Constant(value_ints=[1]))
    return op.TopK(x, size, axis=dim, largest=int(descending), sorted=1)


def _strip(path: Path, graph: Graph) -> list[str]:
    """Leave out where each operation stands in which source, and name the sizes that are not known. Returns the names
    of those that stand in modules whose weights stay exact."""
    model = onnx.load(str(path), load_external_data=False)
    modules = [f"'{name}'" for name in graph.exact_names]
    stands = {node.name: prop.value for node in model.graph.node for prop in node.metadata_props if prop.key == SCOPES}
    del model.metadata_props[:], model.graph.metadata_props[:]
    del model.graph.value_info[:]  # what follows from the rest; its sizes have names that mean nothing
    for part in (*model.graph.node, *model.graph.initializer, *model.graph.input, *model.graph.output):
        del part.metadata_props[:]
        part.doc_string = ""
    for function in model.functions:
        del function.metadata_props[:], function.value_info[:]
        for node in function.node:
            del node.metadata_props[:]
            node.doc_string = ""
    ports = (*zip(model.graph.input, graph.inputs, strict=True), *zip(model.graph.output, graph.outputs, strict=True))
    for value, port in ports:
        for place, dim in zip(value.type.tensor_type.shape.dim, port.dims, strict=True):
            if isinstance(dim, str):
                place.dim_param = dim
            else:
                place.dim_value = dim
    path.write_bytes(model.SerializeToString(deterministic=True))
    return [name for name, scopes in stands.items() if any(module in scopes for module in modules)]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the remarks that exporter, optimizer and quantizer make on their own workings."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
