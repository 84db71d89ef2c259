"""ONNX files, run by onnxruntime."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnxruntime  # pyright: ignore[reportMissingImports]
import torch
from torch import Tensor

from llmtrain.errors import ExportError
from llmtrain.interop.graphs.ports import Graph


class OnnxSessions:
    """The files of a folder on the CPU, with as many threads as PyTorch has. Raises ExportError for what onnxruntime
    does not load or run."""

    def __init__(self, folder: Path, graphs: Sequence[Graph]) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3  # errors: it warns of what it makes better
        self._sessions = dict[str, onnxruntime.InferenceSession]()
        for graph in graphs:
            with _told("load", graph):
                self._sessions[graph.name] = onnxruntime.InferenceSession(
                    str(folder / f"{graph.name}.onnx"), options, providers=["CPUExecutionProvider"]
                )

    def run(self, graph: Graph, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The outputs of one graph, in the order of its ports."""
        session = self._sessions[graph.name]
        taken = {value.name for value in session.get_inputs()}
        given = {port.name: x.numpy() for port, x in zip(graph.inputs, inputs, strict=True) if port.name in taken}
        with _told("run", graph):
            found = session.run([port.name for port in graph.outputs], given)
        return [torch.from_numpy(np.asarray(array)) for array in found]


@contextmanager
def _told(does: str, graph: Graph) -> Iterator[None]:
    """Its errors have many classes, which have no other in common than Exception."""
    try:
        yield
    except Exception as error:
        raise ExportError(
            f"onnxruntime {onnxruntime.__version__} does not {does} {graph.name}.onnx: {str(error)[:300]}. Nothing is "
            "left of the folder. Try another version of onnxruntime, or --to torch-export."
        ) from error
