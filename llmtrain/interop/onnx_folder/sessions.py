"""ONNX files, run by onnxruntime."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime  # pyright: ignore[reportMissingImports]
import torch
from torch import Tensor

from llmtrain.interop.graphs.ports import Graph


class OnnxSessions:
    """The files of a folder on the CPU, with as many threads as PyTorch has."""

    def __init__(self, folder: Path, graphs: Sequence[Graph]) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3  # errors: it warns of what it makes better
        self._sessions = {
            graph.name: onnxruntime.InferenceSession(
                str(folder / f"{graph.name}.onnx"), options, providers=["CPUExecutionProvider"]
            )
            for graph in graphs
        }

    def run(self, graph: Graph, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The outputs of one graph, in the order of its ports."""
        session = self._sessions[graph.name]
        taken = {value.name for value in session.get_inputs()}
        given = {port.name: x.numpy() for port, x in zip(graph.inputs, inputs, strict=True) if port.name in taken}
        found = session.run([port.name for port in graph.outputs], given)
        return [torch.from_numpy(np.asarray(array)) for array in found]
