"""Linears and experts of a model whose matrices stay in whole numbers.

Shape suffixes: N rows, P rows of experts, I inputs, O outputs, E experts.
"""

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from llmtrain.infer.packed.products import Product
from llmtrain.models.experts.mixture import Experts


class PackedLinear(nn.Module):
    """In place of a linear. The matrix is no parameter: nothing moves it, and nothing looks for its fp32 numbers."""

    def __init__(self, product: Product, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.product, self.bias = product, bias

    def forward(self, x: Tensor) -> Tensor:
        """[..., O] of [..., I]."""
        y = self.product(x.flatten(0, -2)).unflatten(0, x.shape[:-1])
        return y if self.bias is None else y + self.bias


def put_linear(model: nn.Module, name: str, product: Product) -> None:
    """Put a product in place of a linear of the model."""
    place, _, own = name.rpartition(".")
    linear = model.get_submodule(name)
    assert type(linear) is nn.Linear, "what else there is computes more than this product"
    setattr(model.get_submodule(place), own, PackedLinear(product, linear.bias))


def put_experts(model: nn.Module, name: str, products: Mapping[str, Sequence[Product]]) -> None:
    """Put products in place of all weights of stacked experts, by their names there."""
    experts = model.get_submodule(name)
    assert type(experts) is Experts
    for own, of_experts in products.items():
        setattr(experts, own, None)
        experts.products[own] = partial(_multiplied, of_experts)


def _multiplied(products: Sequence[Product], x_PI: Tensor, _: Tensor | None, counts: Tensor | list[int]) -> Tensor:
    """[P, O], in place of `grouped_linear`. The weight is not there any more."""
    assert isinstance(counts, list), "the kernels are for CPUs, where counts are the host's"
    return torch.cat([product(part) for product, part in zip(products, x_PI.split(counts), strict=True)])
