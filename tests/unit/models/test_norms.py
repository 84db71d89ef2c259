import pytest
import torch
from torch import Tensor

from llmtrain.models.pointwise import NORMS, LayerNorm, RMSNorm


def rms_formula(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def layer_formula(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    centered = x - x.mean(-1, keepdim=True)
    return centered / (centered.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight + bias


def random_norm(kind: str) -> RMSNorm | LayerNorm:
    norm = NORMS[kind](12, 1e-5).double()
    for parameter in norm.parameters():
        torch.nn.init.normal_(parameter)
    return norm


@pytest.mark.parametrize("kind", sorted(NORMS))
def test_norm_equals_the_papers_formula(kind: str) -> None:
    torch.manual_seed(0)
    norm, x = random_norm(kind), torch.randn(3, 2, 12, dtype=torch.float64)
    formula = rms_formula if kind == "rmsnorm" else layer_formula
    torch.testing.assert_close(norm(x), formula(x, *norm.parameters(), 1e-5))


@pytest.mark.parametrize("kind", sorted(NORMS))
def test_gradient_is_right(kind: str) -> None:
    torch.manual_seed(0)
    norm = random_norm(kind)
    x = torch.randn(2, 1, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(norm, (x,))


@pytest.mark.parametrize("kind", sorted(NORMS))
def test_statistics_of_low_precision_are_fp32(kind: str) -> None:
    """The mean of 4,096 squares, summed in bf16, would be off by percents; one rounding of the result is not."""
    torch.manual_seed(0)
    norm = NORMS[kind](4096, 1e-5)
    for name, parameter in norm.named_parameters():
        torch.nn.init.constant_(parameter, 1.0 if name == "weight" else 0.0)
    x = (torch.randn(4, 4096) * 3 + 1).bfloat16()
    exact = norm(x.float())
    error = (norm.bfloat16()(x).float() - exact).abs() / exact.abs().clamp(min=1e-2)
    assert error.max() < 2**-7
