"""GPTQ: its factor, its order, and outputs that are nearer than those of rounding."""

import pytest
import torch
from torch import Tensor

from llmtrain.compress.gptq import DAMPING, inverse_factor, quantized
from llmtrain.values.quantization import NumberGrid, Quantized, round_to_nearest


def _correlated(inputs: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Positions whose inputs hang together, and the sum of x x^T."""
    generator = torch.Generator().manual_seed(seed)
    x_NI = torch.randn(400, inputs, generator=generator) @ torch.randn(inputs, inputs, generator=generator)
    return x_NI, (x_NI.T @ x_NI).double()


def _by_definition(weight_OI: Tensor, product_II: Tensor, grid: NumberGrid) -> Quantized:
    """Algorithm 1 without blocks: after each column, the inverse of what is left of the Hessian."""
    damped_II = product_II + DAMPING * product_II.diagonal().mean() * torch.eye(len(product_II), dtype=torch.float64)
    left_OI, numbers_OI, scales = weight_OI.double().clone(), torch.empty(weight_OI.shape, dtype=torch.int8), []
    group = grid.group or weight_OI.shape[1]
    for column in range(weight_OI.shape[1]):
        if column % group == 0:
            scales.append(NumberGrid(grid.bits).scales(left_OI[:, column : column + group].float()))
        inverse_II = torch.linalg.inv(damped_II[column:, column:])
        numbers_OI[:, column] = NumberGrid(grid.bits).nearest(left_OI[:, column : column + 1].float(), scales[-1])[:, 0]
        error_O = left_OI[:, column] - numbers_OI[:, column].double() * scales[-1][:, 0].double()
        left_OI[:, column:] -= error_O[:, None] * inverse_II[0] / inverse_II[0, 0]
    return Quantized(numbers_OI, torch.cat(scales, 1))


@pytest.mark.parametrize("grid", [NumberGrid(4, 16), NumberGrid(4), NumberGrid(8, 8)])
def test_it_is_the_algorithm_of_the_paper(grid):
    _, product = _correlated(48)
    weight = torch.randn(20, 48, generator=torch.Generator().manual_seed(1))
    expected, found = _by_definition(weight, product, grid), quantized(weight, product, grid, torch.float32)
    same = (expected.numbers_OI == found.numbers_OI).float().mean()
    assert same > 0.99, "but for ties that rounding decides"
    torch.testing.assert_close(found.scale_OG, expected.scale_OG, rtol=1e-2, atol=0)


@pytest.mark.parametrize("grid", [NumberGrid(4, 32), NumberGrid(4), NumberGrid(8)])
def test_outputs_are_nearer_than_those_of_rounding(grid):
    x, product = _correlated(160)  # more columns than a block has
    weight = torch.randn(40, 160, generator=torch.Generator().manual_seed(2))

    def error(made: Quantized) -> float:
        return float(((made.dequantized() - weight) @ x.T).norm())

    assert error(quantized(weight, product, grid, torch.float32)) < 0.8 * error(round_to_nearest(weight, grid))


def test_inputs_that_are_always_zero_and_none_at_all():
    _, product = _correlated(32)
    product[5], product[:, 5] = 0.0, 0.0
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(3))
    assert torch.isfinite(quantized(weight, product, NumberGrid(4, 8), torch.float32).dequantized()).all()
    alone = quantized(weight, None, NumberGrid(4, 8), torch.float32)
    assert torch.equal(alone.numbers_OI, round_to_nearest(weight, NumberGrid(4, 8)).numbers_OI)


def test_the_factor_is_that_of_the_inverse():
    _, product = _correlated(24)
    upper = inverse_factor(product).double()
    damped = product + DAMPING * product.diagonal().mean() * torch.eye(24, dtype=torch.float64)
    assert torch.equal(upper, upper.triu())
    torch.testing.assert_close(upper.T @ upper @ damped, torch.eye(24, dtype=torch.float64), atol=1e-4, rtol=0)
