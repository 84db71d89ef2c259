"""GPTQ: the numbers of a matrix chosen one column after the other, each making up for the errors of those before it.

Frantar et al. 2022, "GPTQ", section 3.3, algorithm 1, with columns in their own order. Layer after layer, on what the
quantized layers before have put out.

Shape suffixes: O outputs, I inputs, G groups of inputs.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from llmtrain.compress.layer_inputs import InputSums
from llmtrain.compress.layered import LayeredModel
from llmtrain.interop.compressed.choice import MatrixChoice
from llmtrain.interop.compressed.tensors import WEIGHT
from llmtrain.values.batch import Batch
from llmtrain.values.quantization import NumberGrid, Quantized, round_to_nearest

DAMPING = 0.01
"""Share of the mean of the Hessian's diagonal that is added to it."""
BLOCK = 128
"""Columns whose errors are brought to those behind them together."""


class GptqQuantizer:
    """Makes the numbers of a model's matrices, layer after layer, with what calibration text puts into them."""

    def __init__(self, model: LayeredModel, batches: Sequence[Batch], choice: MatrixChoice, dtype: torch.dtype) -> None:
        self._choice, self._dtype = choice, dtype
        self._layers = self._iter_quantized(model, batches)
        self._name, self._found = "", dict[tuple[str, int | None], Quantized]()

    def __call__(self, name: str, expert: int | None = None) -> Quantized:
        """The numbers of a weight by its global name; layers are asked for in the model's order."""
        layer = ".".join(name.split(".")[:3])
        while self._name != layer:
            self._name, self._found = next(self._layers)
        return self._found[name.removesuffix(WEIGHT), expert]

    def _iter_quantized(
        self, model: LayeredModel, batches: Sequence[Batch]
    ) -> Iterator[tuple[str, dict[tuple[str, int | None], Quantized]]]:
        for layer_name, layer, calls in model.iter_layers(batches):
            products, found = InputSums(layer), dict[tuple[str, int | None], Quantized]()
            products.gather(calls)
            for name, weight in layer.named_parameters():
                linear = f"{layer_name}.{name}".removesuffix(WEIGHT)
                if linear not in self._choice.linears or name.endswith(".bias"):
                    continue
                stacked = weight.dim() == 3
                for expert, matrix in enumerate(weight) if stacked else ((None, weight),):
                    product = products.of(name.removesuffix(WEIGHT), expert)
                    grid = self._choice.form.grid(matrix.shape[1])
                    made = quantized(matrix, product, grid, self._dtype)
                    matrix.copy_(made.dequantized())
                    found[linear, expert] = made
            yield layer_name, found


def quantized(weight_OI: Tensor, product_II: Tensor | None, grid: NumberGrid, dtype: torch.dtype) -> Quantized:
    """The numbers of a matrix, of whose inputs the sum of x x^T is given. Without one, each is rounded by itself."""
    if product_II is None:
        return round_to_nearest(weight_OI, grid, dtype)
    left_OI, upper_II = weight_OI.float().clone(), inverse_factor(product_II)
    whole_O1 = None if grid.group else grid.scales(weight_OI, dtype)
    numbers_OI, scales, column_grid = (
        torch.empty(weight_OI.shape, dtype=torch.int8),
        list[Tensor](),
        NumberGrid(grid.bits),
    )
    # A block is a group: when its scale is made, its weights have the errors of all columns before it.
    for block in torch.arange(weight_OI.shape[1]).split(grid.group or BLOCK):
        start, end = int(block[0]), int(block[-1]) + 1
        scale_O1 = column_grid.scales(left_OI[:, start:end], dtype) if whole_O1 is None else whole_O1
        scales.append(scale_O1)
        errors_OB = torch.empty(len(left_OI), end - start)
        for column in range(start, end):
            numbers_OI[:, column] = column_grid.nearest(left_OI[:, column : column + 1], scale_O1)[:, 0]
            rounded_O = numbers_OI[:, column].float() * scale_O1[:, 0].float()
            error_O = (left_OI[:, column] - rounded_O) / upper_II[column, column]
            left_OI[:, column:end] -= error_O[:, None] * upper_II[column, column:end]
            errors_OB[:, column - start] = error_O
        left_OI[:, end:] -= errors_OB @ upper_II[start:end, end:]
    return Quantized(numbers_OI, scales[0] if whole_O1 is not None else torch.cat(scales, 1))


def inverse_factor(product_II: Tensor) -> Tensor:
    """The upper triangular U with U^T U = H^-1, of the damped H: by one Cholesky, of H with its order reversed.

    Inputs that are always zero get a one on the diagonal: their weights have no part in any output.
    """
    damped_II = product_II.double().clone()
    diagonal_I = damped_II.diagonal()
    diagonal_I[diagonal_I == 0] = 1.0
    diagonal_I += DAMPING * diagonal_I.mean()
    lower_II = torch.linalg.cholesky(damped_II.flip(0, 1))
    inverse_II = torch.linalg.solve_triangular(lower_II, torch.eye(len(lower_II), dtype=torch.float64), upper=False)
    return inverse_II.flip(0, 1).float()
