import math

import pytest
import torch

from llmtrain.config.model import RopeScaling
from llmtrain.models.positions import rotary_angles, rotate, sinusoids, stretched_frequencies
from tests.support.samples import tiny_model


def test_rotation_equals_complex_multiplication() -> None:
    """Su et al. 2021, eq. 12: the pair (x[i], x[i + D/2]) as a complex number times e^(i m theta_i)."""
    torch.manual_seed(0)
    config = tiny_model(head_dim=8)
    positions_BS = torch.tensor([[0, 1, 5, 9], [3, 2, 1, 0]])
    x_SBND = torch.randn(4, 2, 4, 8)
    turned = rotate(x_SBND, rotary_angles(config, positions_BS, torch.float32))
    for s in range(4):
        for b in range(2):
            for i in range(4):
                angle = float(positions_BS[b, s]) * 10000.0 ** (-2 * i / 8)
                turn = complex(math.cos(angle), math.sin(angle))
                pair = torch.complex(x_SBND[s, b, :, i], x_SBND[s, b, :, i + 4]) * turn
                torch.testing.assert_close(turned[s, b, :, i], pair.real)
                torch.testing.assert_close(turned[s, b, :, i + 4], pair.imag)


def test_scores_depend_on_distance_only() -> None:
    torch.manual_seed(0)
    config = tiny_model(head_dim=16)
    q, k = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)

    def score(query_at: int, key_at: int) -> torch.Tensor:
        turned_q = rotate(q, rotary_angles(config, torch.tensor([[query_at]]), torch.float32))
        turned_k = rotate(k, rotary_angles(config, torch.tensor([[key_at]]), torch.float32))
        return (turned_q * turned_k).sum()

    torch.testing.assert_close(score(7, 3), score(57, 53))
    assert not torch.allclose(score(7, 3), score(7, 4))


def test_rotation_gradient_is_right() -> None:
    torch.manual_seed(0)
    rotary = rotary_angles(tiny_model(head_dim=8), torch.arange(3)[None], torch.float64)
    x = torch.randn(3, 1, 2, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: rotate(x, rotary), (x,))


def test_sinusoids_equal_the_papers_formula() -> None:
    table = sinusoids(torch.tensor([[0, 1, 7]]), 6)
    assert table.shape == (3, 1, 6)
    for s, position in enumerate((0, 1, 7)):
        for i in range(3):
            angle = position / 10000 ** (2 * i / 6)
            assert table[s, 0, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-6)
            assert table[s, 0, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-6)


def test_llama3_stretching_keeps_high_and_divides_low_frequencies() -> None:
    scaling = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=8192)
    wavelengths = torch.tensor([100.0, 8192 / 4, 8192.0, 100_000.0])
    frequencies = 2 * math.pi / wavelengths
    ratios = frequencies / stretched_frequencies(frequencies, scaling)
    torch.testing.assert_close(ratios, torch.tensor([1.0, 1.0, 8.0, 8.0]))
