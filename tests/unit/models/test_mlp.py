import math

import pytest
import torch
from torch import Tensor

from llmtrain.models.pointwise import MLP, Recompute
from tests.support.live_bytes import LiveBytes
from tests.support.samples import tiny_model

FORMULAS = {
    "relu": lambda x: x.clamp(min=0),
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "tanh": lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "none": lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2))),
}
"""ReLU, SiLU, and GELU's approximation and exact form (Hendrycks and Gimpel 2016)."""


def formula(activation: str, approximate: str) -> str:
    return {"relu": "relu", "reglu": "relu", "swiglu": "silu"}.get(activation, approximate)


CASES = [("relu", "tanh"), ("reglu", "tanh"), ("swiglu", "tanh")]
CASES += [(a, approximate) for a in ("gelu", "geglu") for approximate in ("tanh", "none")]


@pytest.mark.parametrize(("activation", "approximate"), CASES)
def test_mlp_equals_its_formula_and_gradient(activation: str, approximate: str) -> None:
    torch.manual_seed(0)
    config = tiny_model(
        hidden_size=6, num_heads=1, num_kv_heads=1, ffn_hidden_size=10, bias=True,
        activation=activation, gelu_approximate=approximate,
    )  # fmt: skip
    mlp = MLP(config).double()
    x = torch.randn(3, 2, 6, dtype=torch.float64, requires_grad=True)

    def linear(name: str, x: Tensor) -> Tensor:
        layer = getattr(mlp, name)
        return torch.einsum("sbh,fh->sbf", x, layer.weight) + layer.bias

    f = FORMULAS[formula(activation, approximate)]
    inner = f(linear("gate", x)) * linear("up", x) if config.gated else f(linear("up", x))
    torch.testing.assert_close(mlp(x), linear("down", inner))
    assert torch.autograd.gradcheck(lambda x, *_: mlp(x), (x, *mlp.parameters()))


def test_default_inner_width() -> None:
    assert tiny_model(hidden_size=128, activation="gelu").ffn_size == 512
    # 8/3 * 4096 = 10922.7, rounded up to a multiple of 64.
    assert tiny_model(hidden_size=4096, activation="swiglu").ffn_size == 10944


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_on_a_gpu_less_is_kept_and_the_bits_are_the_same(
    activation: str, recompute: Recompute, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the inner width the outputs of the linears alone: 2 f gated, f otherwise, in place of 4 f and 2 f."""
    config = tiny_model(ffn_hidden_size=80, activation=activation)
    mlp = MLP(config, recompute=recompute).train()
    for parameter in mlp.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(5))
    results, widths = [], []
    for less in (False, True):
        monkeypatch.setattr("llmtrain.models.pointwise.keeps_less", lambda x, less=less: less)
        x = torch.randn(5, 3, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
        with LiveBytes() as live:
            out = mlp(x)
        widths.append((live.num_bytes - out.nbytes) / (5 * 3 * 80 * 4))
        weights = torch.linspace(-1, 1, out.numel()).view_as(out)
        results.append([out, *torch.autograd.grad((out * weights).sum(), [x, *mlp.parameters()])])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    gated = activation == "swiglu"
    kept = (3 if recompute == "selective" else 4) if gated else 2
    assert widths == [kept, kept if recompute == "full" else 2 if gated else 1], "whole layers keep nothing anyway"
