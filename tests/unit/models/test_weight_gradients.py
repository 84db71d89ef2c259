"""Weight gradients that are left for later are, bit for bit, those of one backward pass, and come when they are due."""

from collections.abc import Callable
from itertools import count

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llmtrain.models.attention.joint_product import JointProduct, find_joint, joint_outputs, put_side_by_side
from llmtrain.models.experts.mixture import grouped_linear
from llmtrain.models.weight_gradients import WeightGradients

TYPES = [torch.float32, torch.bfloat16, torch.float16]
Result = tuple[Tensor, Tensor, Tensor, Tensor | None]
"""Output, and gradients of input, weight and bias."""


def results(output: Tensor, x: Tensor, linear: nn.Linear) -> Result:
    assert x.grad is not None and linear.weight.grad is not None
    return output, x.grad, linear.weight.grad, None if linear.bias is None else linear.bias.grad


def same(one: Result, other: Result) -> bool:
    pairs = zip(one, other, strict=True)
    return all((a is None and b is None) or torch.equal(a, b) for a, b in pairs)  # type: ignore[arg-type]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", TYPES)
def test_a_linear_apart_computes_the_same_bits(dtype: torch.dtype, bias: bool, transposed: bool) -> None:
    torch.manual_seed(1)
    linear, held = nn.Linear(32, 48, bias=bias).to(dtype), WeightGradients()
    values = torch.randn(2, 17, 32, dtype=dtype).transpose(0, 1)
    x = (values if transposed else values.contiguous()).detach().requires_grad_()
    gradient = torch.randn(17, 2, 48).to(dtype)
    output = linear(x)
    output.backward(gradient)
    whole = results(output, x, linear)
    linear.weight.grad = x.grad = None
    linear.zero_grad()
    output = held.linear(x, linear.weight, linear.bias)
    output.backward(gradient)
    held.close()
    assert linear.weight.grad is None, "not in the backward pass"
    held.compute_oldest()
    assert same(whole, results(output, x, linear))


@pytest.mark.parametrize("counts", [[3, 0, 5, 8], [16, 0, 0, 0]])
@pytest.mark.parametrize(("dtype", "one_kernel"), [*((dtype, False) for dtype in TYPES), (torch.bfloat16, True)])
def test_experts_apart_compute_the_same_bits(dtype: torch.dtype, counts: list[int], one_kernel: bool) -> None:
    torch.manual_seed(1)
    rows = torch.tensor(counts).cumsum(0).to(torch.int32) if one_kernel else counts
    weight, held = nn.Parameter(torch.randn(4, 48, 32).to(dtype)), WeightGradients()
    x, gradient = torch.randn(16, 32).to(dtype).requires_grad_(), torch.randn(16, 48).to(dtype)
    found: list[tuple[Tensor, Tensor | None, Tensor | None]] = []
    for product in (grouped_linear, held.grouped_linear):
        weight.grad = x.grad = None
        output = product(x, weight, rows)
        output.backward(gradient)
        if product == held.grouped_linear:
            held.close()
            assert weight.grad is None
            held.compute_oldest()
        found.append((output, x.grad, weight.grad))
    for one, other in zip(*found, strict=True):
        assert one is not None and other is not None and torch.equal(one, other)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", TYPES)
def test_several_linears_in_one_product_apart_compute_the_same_bits(dtype: torch.dtype, bias: bool) -> None:
    torch.manual_seed(1)
    linears = [nn.Linear(32, outputs, bias=bias).to(dtype) for outputs in (32, 16, 16)]
    put_side_by_side(linears)
    joint, held = find_joint(linears), WeightGradients()
    assert joint is not None
    x, found = torch.randn(17, 2, 32).to(dtype).requires_grad_(), list[list[Tensor | None]]()
    gradients = [torch.randn(17, 2, linear.out_features).to(dtype) for linear in linears]
    for product in (JointProduct.apply, held.joint_product):
        x.grad = None
        for linear in linears:
            linear.zero_grad()
        outputs = joint_outputs(x, *joint, linears, product)
        torch.autograd.backward(outputs, gradients)
        if product == held.joint_product:
            held.close()
            assert all(linear.weight.grad is None for linear in linears)
            held.compute_oldest()
        parameters = [parameter for linear in linears for parameter in linear.parameters()]
        found.append([*outputs, x.grad, *(parameter.grad for parameter in parameters)])
    for one, other in zip(*found, strict=True):
        assert one is not None and other is not None and torch.equal(one, other)


def test_micro_batches_are_computed_one_by_one_oldest_first() -> None:
    """And what waits for a weight's gradient is called then, not before."""
    held, weights = WeightGradients(), [nn.Parameter(torch.randn(4, 4)) for _ in range(2)]
    called: list[int] = []
    # Accumulation's own hook, as megatron-core's data parallelism has it.
    nodes = [weight.expand_as(weight).grad_fn.next_functions[0][0] for weight in weights]  # type: ignore[union-attr]
    for number, node in enumerate(nodes):
        node.register_hook(lambda *_, number=number: called.append(number))
    inputs = [torch.randn(3, 4) for _ in range(2)]
    for x in inputs:
        held.linear(held.linear(x.requires_grad_(), weights[0]), weights[1]).sum().backward()
        held.close()
    assert called == []
    held.compute_oldest()
    assert called == [1, 0], "in the order of the backward pass"
    first = [weight.grad.clone() for weight in weights if weight.grad is not None]
    held.compute_oldest()
    assert called == [1, 0, 1, 0]
    for weight, x in zip(weights, inputs, strict=False):
        assert weight.grad is not None and x.grad is not None
    expected = torch.autograd.grad((inputs[0].detach() @ weights[0].T @ weights[1].T).sum(), weights)
    assert all(torch.allclose(a, b) for a, b in zip(first, expected, strict=True))


def test_a_frozen_weight_leaves_nothing_and_a_frozen_input_does_not_matter() -> None:
    held, linear = WeightGradients(), nn.Linear(4, 4)
    linear.weight.requires_grad_(False)
    assert linear.bias is not None
    held.linear(torch.randn(3, 4), linear.weight, linear.bias).sum().backward()
    held.close()
    held.compute_oldest()
    assert linear.weight.grad is None and linear.bias.grad is not None
    trained = nn.Parameter(torch.randn(4, 4))
    held.linear(torch.randn(3, 4), trained).sum().backward()  # behind frozen embeddings
    held.close()
    held.compute_oldest()
    assert trained.grad is not None


def recomputed(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    result = checkpoint(function, x, use_reentrant=False, preserve_rng_state=False)
    assert isinstance(result, Tensor)
    return result


def test_a_layer_that_is_computed_again_leaves_its_gradient_once() -> None:
    held, weight = WeightGradients(), nn.Parameter(torch.randn(4, 4))
    x, calls = torch.randn(3, 4, requires_grad=True), count()

    def layer(x: Tensor) -> Tensor:
        next(calls)
        return held.linear(x.tanh(), weight).square()

    layer(x).sum().backward()
    held.close()
    held.compute_oldest()
    plain, weight.grad = weight.grad, None
    recomputed(layer, x).sum().backward()
    held.close()
    held.compute_oldest()
    assert next(calls) == 3 and plain is not None and weight.grad is not None
    assert torch.equal(plain, weight.grad)


def test_without_gradients_it_is_a_plain_product() -> None:
    held, linear = WeightGradients(), nn.Linear(4, 4)
    x = torch.randn(3, 4)
    with torch.no_grad():
        output = held.linear(x, linear.weight, linear.bias)
        assert torch.equal(output, linear(x)) and not output.requires_grad
