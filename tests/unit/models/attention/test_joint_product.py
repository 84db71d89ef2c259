"""Queries, keys and values in one product: the same values and gradients, fewer products, and only where it is so."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from llmtrain.models.attention.joint_product import find_joint, joint_outputs, put_side_by_side

ROWS = (8, 4, 4)


class Products(TorchDispatchMode):
    """Counts the matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.names["products"] += name in ("mm", "addmm", "matmul", "linear")
        return func(*args, **(kwargs or {}))


def linears_of(bias: bool) -> list[nn.Linear]:
    torch.manual_seed(0)
    return [nn.Linear(6, rows, bias=bias, dtype=torch.float64) for rows in ROWS]


def run(linears: list[nn.Linear], x: Tensor, joint: bool) -> tuple[list[Tensor], dict[str, int]]:
    """Outputs and all gradients, and the number of products."""
    x = x.clone().requires_grad_()
    with Products() as counted:
        if joint:
            found = find_joint(linears)
            assert found is not None
            outputs = joint_outputs(x, *found, linears)
        else:
            outputs = [linear(x) for linear in linears]
        torch.autograd.backward([output.square().sum() * (1 + n) for n, output in enumerate(outputs)])
    grads = [p.grad for linear in linears for p in linear.parameters() if p.grad is not None]
    for linear in linears:
        linear.zero_grad()
    assert x.grad is not None
    return [*outputs, x.grad, *grads], dict(counted.names)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
@pytest.mark.parametrize("trained", [True, False])
def test_values_and_gradients_are_those_of_single_products(bias: bool, order: tuple[int, ...], trained: bool) -> None:
    linears = linears_of(bias)
    for linear in linears:
        linear.weight.requires_grad_(trained)
    x = torch.randn(5, 3, 6, dtype=torch.float64)
    single, many = run(linears, x, joint=False)
    put_side_by_side([linears[number] for number in order])
    found = find_joint(linears)
    assert found is not None
    assert found[1] == list(order)
    together, few = run(linears, x, joint=True)
    assert len(single) == len(together) == 4 + trained * 3 + bias * 3
    for one, other in zip(single, together, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    assert (many["products"], few["products"]) == ((9, 3) if trained else (6, 2))


def test_updates_of_the_weights_are_updates_of_the_joint_one() -> None:
    linears = linears_of(False)
    put_side_by_side(linears)
    found = find_joint(linears)
    assert found is not None
    with torch.no_grad():
        linears[1].weight.fill_(7.0)
    assert torch.equal(found[0], torch.cat([linear.weight for linear in linears]))


def test_what_does_not_lie_side_by_side_is_multiplied_by_itself() -> None:
    linears = linears_of(False)
    assert find_joint(linears) is None, "memory of their own"
    put_side_by_side(linears)
    linears[0].weight.requires_grad_(False)
    assert find_joint(linears) is None, "frozen in part"
    linears[0].weight.requires_grad_(True)
    with torch.no_grad():
        linears[1].weight.data = linears[1].weight.clone()
    assert find_joint(linears) is None, "one has moved"

    class OtherLinear(nn.Linear):
        pass

    put_side_by_side(linears)
    assert find_joint(linears) is not None
    linears[1].__class__ = OtherLinear
    assert find_joint(linears) is None, "it may compute something else"


def test_weights_that_move_later_are_noticed() -> None:
    linears = linears_of(False)
    put_side_by_side(linears)
    found = find_joint(linears)
    assert found is not None
    linears[0].weight.data = linears[0].weight.detach().clone()
    with pytest.raises(AssertionError, match="have moved"):
        joint_outputs(torch.randn(2, 1, 6, dtype=torch.float64), *found, linears)
