"""Products in whole numbers are within the bounds that their pages state, and each row is by itself."""

import pytest
import torch
from torch import Tensor

from llmtrain.infer.packed import products
from llmtrain.infer.packed.products import (
    KERNEL_GROUPS,
    LARGEST,
    MOST_INPUTS,
    digits_of,
    four_bit_product,
    sums_are_exact,
    whole_product,
)
from llmtrain.models.rounded_inputs import rounded_tokens
from llmtrain.values.quantization import NumberGrid, Quantized, round_to_nearest

SHAPES = [(48, 64), (33, 20), (1, 1), (16, 300)]


@pytest.fixture(autouse=True)
def exact_sums() -> None:
    if not sums_are_exact():
        pytest.skip("this CPU has no VNNI")


def inputs(rows: int, columns: int) -> Tensor:
    """Rows of very different sizes, one with an input far above the others, and one of zeros."""
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))
    x *= torch.logspace(-20, 20, rows)[:, None]
    x[rows // 2, columns // 2] *= 1000
    x[-1] = 0
    return x


def matrix(outputs: int, columns: int, grid: NumberGrid) -> Quantized:
    return round_to_nearest(torch.randn(outputs, columns, generator=torch.Generator().manual_seed(outputs)), grid)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("outputs", "columns"), SHAPES)
def test_three_digits_are_as_good_as_fp32(outputs: int, columns: int, bits: int) -> None:
    stored, x = matrix(outputs, columns, NumberGrid(bits)), inputs(9, columns)
    weight = stored.dequantized().double()
    exact = x.double() @ weight.T
    step = x.double().abs().amax(-1, keepdim=True) / LARGEST
    # Less than a step of the grid for each input, and some roundings of what is of the size of the terms' sum.
    bound = step * weight.abs().sum(-1) + 2.0**-21 * (x.double().abs() @ weight.abs().T)
    assert ((whole_product(stored, rounds=False)(x).double() - exact).abs() <= bound).all()


@pytest.mark.parametrize(("outputs", "columns"), SHAPES)
def test_rounded_inputs_are_those_of_the_dequantized_model(outputs: int, columns: int) -> None:
    stored, x = matrix(outputs, columns, NumberGrid(8)), inputs(9, columns)
    exact = rounded_tokens(x).double() @ stored.dequantized().double().T
    bound = 2.0**-21 * (rounded_tokens(x).double().abs() @ stored.dequantized().double().abs().T)
    assert ((whole_product(stored, rounds=True)(x).double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("group", KERNEL_GROUPS)
def test_four_bits_are_as_good_as_bfloat16(group: int) -> None:
    stored, x = matrix(48, 512, NumberGrid(4, group)), inputs(9, 512)
    weight = stored.dequantized().double()
    exact = x.double() @ weight.T
    # The scale, the weight, the input and the output are rounded, each by 2^-9 at most.
    bound = 3.1 * 2.0**-9 * (x.double().abs() @ weight.abs().T) + 1.1 * 2.0**-9 * exact.abs()
    found = four_bit_product(stored)(x)
    assert found.dtype == torch.float32 and ((found.double() - exact).abs() <= bound).all()


def test_a_wrong_zero_and_swapped_digits_are_beyond_the_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    stored = matrix(48, 512, NumberGrid(4, 32))
    moved = Quantized(stored.numbers_OI + 1, stored.scale_OG)
    swapped = Quantized(stored.numbers_OI.unflatten(1, (-1, 2)).flip(-1).flatten(1), stored.scale_OG)
    for wrong in (moved, swapped):
        monkeypatch.setattr("tests.unit.infer.packed.test_products.four_bit_product", lambda _, w=wrong: four_bit(w))
        with pytest.raises(AssertionError):
            test_four_bits_are_as_good_as_bfloat16(32)
    digits = products.digits_of

    def reversed_digits(x_NI: Tensor) -> tuple[Tensor, Tensor]:
        found, scale = digits(x_NI)
        return found.flip(0), scale

    monkeypatch.setattr(products, "digits_of", reversed_digits)
    with pytest.raises(AssertionError):
        test_three_digits_are_as_good_as_fp32(48, 64, 8)


four_bit = four_bit_product


def test_digits_spell_the_numbers() -> None:
    x = torch.tensor([[LARGEST, -LARGEST, 0, 1, -1, 127, 128, -128, -129, 32767, 32768]], dtype=torch.float32)
    digits_DNI, scale_N1 = digits_of(x)
    assert digits_DNI.dtype == torch.int8
    spelled = (digits_DNI.long() * torch.tensor([1, 256, 65536]).view(3, 1, 1)).sum(0)
    assert torch.equal(spelled.float() * scale_N1, x)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("rounds", [False, True])
def test_what_is_no_number_stays_none(value: float, rounds: bool) -> None:
    x = torch.ones(2, 64)
    x[0, 3] = value
    found = whole_product(matrix(48, 64, NumberGrid(8)), rounds)(x)
    assert not found[0].isfinite().any() and found[1].isfinite().all()


def test_rows_are_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "ROWS", 8)
    whole, four = matrix(48, 256, NumberGrid(8)), matrix(48, 256, NumberGrid(4, 64))
    x = torch.randn(21, 256, generator=torch.Generator().manual_seed(0))
    for product in (whole_product(whole, False), whole_product(whole, True), four_bit_product(four)):
        alone = torch.cat([product(row[None]) for row in x])
        for rows in (1, 2, 7, 8, 9, 21):
            assert torch.equal(product(x[:rows]), alone[:rows])
        assert product(x[:0]).shape == (0, 48)


def test_the_longest_sum_has_room() -> None:
    largest = torch.full((1, MOST_INPUTS), -128, dtype=torch.int8)
    assert int(torch.ops.aten._int_mm(largest, largest.T)) == MOST_INPUTS * 128 * 128 < 1 << 31
