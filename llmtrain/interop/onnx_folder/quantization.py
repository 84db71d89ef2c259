"""Matrices of a graph in whole numbers of 8 or 4 bits, with a scale for each block of a column.

Only weights are rounded, and each block by itself: what a text gives does not depend on its neighbours in a batch, as
it would where one scale is found for all activations. Embeddings, which are looked up and not multiplied, stay in fp32,
as does what routes tokens to experts.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx  # pyright: ignore[reportMissingImports]
from onnx import numpy_helper  # pyright: ignore[reportMissingImports]
from onnxruntime.quantization.matmul_nbits_quantizer import (  # pyright: ignore[reportMissingImports]
    MatMulNBitsQuantizer,
)

BITS = {"int8": 8, "int4": 4}
BLOCK = 32
"""Rows of a matrix that share a scale. Smaller blocks round less and take more scales: 4 bits become 4.5 or 5."""


def quantize(path: Path, precision: str, exact: Sequence[str], largest_file: int) -> None:
    """Round the weights of all products with a matrix, in place, but for operations whose names are in `exact`. More
    bytes of weights than `largest_file` lie in a file beside the model's."""
    model = onnx.load(str(path))
    _turn_weights(model)
    quantizer = MatMulNBitsQuantizer(
        model, bits=BITS[precision], block_size=BLOCK, is_symmetric=True, nodes_to_exclude=list(exact)
    )
    quantizer.process()
    rounded = quantizer.model.model
    for file in (path, path.with_name(f"{path.name}.data")):
        file.unlink(missing_ok=True)
    if sum(len(weight.raw_data) for weight in rounded.graph.initializer) > largest_file:
        onnx.save_model(rounded, str(path), save_as_external_data=True, location=f"{path.name}.data")
    else:
        path.write_bytes(rounded.SerializeToString(deterministic=True))


def _turn_weights(model: onnx.ModelProto) -> None:
    """Turn weights around once and for all where the graph does so each time: only then does a product have a matrix
    of its own, which can be rounded. One that is used otherwise too, as a tied embedding is, is kept beside it."""
    weights = {weight.name: weight for weight in model.graph.initializer}
    kept, turned = list[onnx.NodeProto](), dict[str, str]()
    for node in model.graph.node:
        if node.op_type != "Transpose" or node.input[0] not in weights or len(weights[node.input[0]].dims) != 2:
            kept.append(node)
            continue
        turned[node.output[0]] = node.input[0]
    for output, name in turned.items():
        array = np.ascontiguousarray(numpy_helper.to_array(weights[name]).T)
        model.graph.initializer.append(numpy_helper.from_array(array, output))
    used = {name for node in kept for name in node.input} | {value.name for value in model.graph.output}
    left = [weight for weight in model.graph.initializer if weight.name in used]
    del model.graph.node[:], model.graph.initializer[:]
    model.graph.node.extend(kept)
    model.graph.initializer.extend(left)
