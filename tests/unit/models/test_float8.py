"""Products in float8: which linears make them, of which values; on the CPU the values are rounded as on a GPU.

What needs torchao runs in a process of its own: see tests/support/readers.py.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmtrain.engines.torch_engine import TorchEngine
from llmtrain.errors import ConfigError
from llmtrain.models.float8 import multiply_in_float8, require_float8
from llmtrain.models.transformer import Transformer, build_model
from tests.support.ranks import run_ranks
from tests.support.readers import require_torchao, use_torchao
from tests.support.samples import random_batch, tiny_model, tiny_run

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
SIZES = {"ffn_hidden_size": 64, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16}


def converted(**model: Any) -> Transformer:
    built = build_model(tiny_model(**{**SIZES, **model}))
    multiply_in_float8(built)
    return built


def in_float8(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if type(module).__name__ == "Float8Linear"}


def linears_of_layers_and_no_others() -> None:
    parts = ("attention.q", "attention.k", "attention.v", "attention.out", "mlp.gate", "mlp.up", "mlp.down")
    layers = {f"decoder.layers.{n}.{part}" for n in (0, 1) for part in parts}
    assert in_float8(converted(tie_embeddings=False)) == layers
    experts = converted(moe={"num_experts": 4, "num_shared_experts": 1, "ffn_hidden_size": 40, "every_n_layers": 2})
    assert in_float8(experts) == {name for name in layers if not name.startswith("decoder.layers.1.mlp")}
    encoder = converted(family="encoder", head="mlm", position="learned")
    assert {name.split(".")[0] for name in in_float8(encoder)} == {"encoder"}, "not the head's"


def parameters_stay_the_same_objects() -> None:
    built = build_model(tiny_model(**SIZES))
    before = dict(built.named_parameters())
    multiply_in_float8(built)
    after = dict(built.named_parameters())
    assert list(before) == list(after)
    assert all(before[name] is after[name] for name in before)


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Through float8 and back, with the largest value at the type's largest."""
    scale = torch.finfo(dtype).max / x.abs().max().double()
    return ((x.double() * scale).float().to(dtype).double() / scale).float()


def a_product_is_that_of_rounded_values_forward_and_backward() -> None:
    torch.manual_seed(0)
    layers = nn.ModuleDict({"0": nn.Linear(32, 48, bias=False).bfloat16()})
    weight = layers["0"].weight
    multiply_in_float8(nn.ModuleDict({"decoder": nn.ModuleDict({"layers": layers})}))
    x = torch.randn(16, 32).bfloat16().requires_grad_()
    up = torch.randn(16, 48).bfloat16()
    out = layers["0"](x)
    out.backward(up)
    e4m3, e5m2 = torch.float8_e4m3fn, torch.float8_e5m2
    x_8, weight_8, up_8 = rounded(x.detach(), e4m3), rounded(weight.detach(), e4m3), rounded(up, e5m2)
    assert x.grad is not None
    assert weight.grad is not None
    for ours, theirs, unrounded in (
        (out, x_8 @ weight_8.T, x.float() @ weight.float().T),
        (x.grad, up_8 @ weight_8, up.float() @ weight.float()),
        (weight.grad, up_8.T @ x_8, up.float().T @ x.float()),
    ):
        error = (ours.float() - theirs).norm() / theirs.norm()
        assert error < 5e-3 < 2e-2 < (ours.float() - unrounded).norm() / unrounded.norm()


def losses(precision: str, steps: int = 20) -> list[float]:
    config = tiny_run(tiny_model(**SIZES), {"precision": precision})
    engine = TorchEngine(config, CPU)
    return [engine.train_step(step, [random_batch(seed=step % 2)], 1e-2).loss for step in range(1, steps + 1)]


def training_learns_as_in_bf16() -> None:
    ours, bf16 = losses("fp8"), losses("bf16")
    assert ours[-1] < 0.8 * ours[0]
    assert all(abs(a - b) < 0.05 * b for a, b in zip(ours, bf16, strict=True))
    assert ours != bf16, "the products are others"


def checked_apart(rank: int, world_size: int, check: Callable[[], None]) -> None:
    use_torchao()
    check()


@pytest.mark.parametrize(
    "check",
    [
        linears_of_layers_and_no_others,
        parameters_stay_the_same_objects,
        a_product_is_that_of_rounded_values_forward_and_backward,
        training_learns_as_in_bf16,
    ],
)
def test_with_torchao(check: Callable[[], None]) -> None:
    require_torchao()
    run_ranks(checked_apart, 1, check)


@pytest.mark.parametrize(
    ("device", "capability", "installed", "says"),
    [
        (CPU, (9, 0), True, "needs a GPU, and this rank has the CPU. Try bf16."),
        (GPU, (8, 0), True, "needs a GPU of compute capability 8.9 or more, and A100 has 8.0."),
        (GPU, (9, 0), False, "pip install 'llmtrain[fp8]'"),
        (GPU, (9, 0), True, None),
        (GPU, (8, 9), True, None),
    ],
)
def test_what_it_needs(
    monkeypatch: pytest.MonkeyPatch,
    device: torch.device,
    capability: tuple[int, int],
    installed: bool,
    says: str | None,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    monkeypatch.setattr("llmtrain.models.float8.find_spec", lambda name: object() if installed else None)
    if says is None:
        require_float8(device)
        return
    with pytest.raises(ConfigError) as caught:
        require_float8(device)
    assert says in str(caught.value)
    assert "train.precision = fp8" in str(caught.value)
