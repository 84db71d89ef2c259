"""Queries, keys and values in one product: a GPU is busier with one than with three, of which two may be narrow.

The weights keep their names, shapes and places in checkpoints; what is one is the memory that they lie in. Engines put
them side by side, or find them so in buffers of their own, and weights that lie elsewhere are multiplied one by one: as
those of megatron-core's ZeRO 1 that have biases, which lie between them.

Shape suffixes: S sequence, B micro-batch, H hidden, O outputs of one linear, W outputs of all of them.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class JointProduct(torch.autograd.Function):
    """x W^T + b, cut into the parts of each linear. One product for all gradients of weights, one for the input's."""

    @staticmethod
    def forward(
        ctx: Any, x_SBH: Tensor, joint_WH: Tensor, rows: Sequence[int], *parameters: Tensor
    ) -> tuple[Tensor, ...]:
        """`parameters` are the weights, which the joint one stands for, and behind them the biases, if there are."""
        ctx.save_for_backward(x_SBH, joint_WH)
        ctx.rows = rows
        biases = parameters[len(rows) :]
        return F.linear(x_SBH, joint_WH, torch.cat(biases) if biases else None).split(rows, -1)

    @staticmethod
    def backward(ctx: Any, *grads_SBO: Tensor) -> tuple[Tensor | None, ...]:
        x_SBH, joint_WH = ctx.saved_tensors
        grad_TW = torch.cat(grads_SBO, -1).flatten(0, -2)
        d_x_SBH = (grad_TW @ joint_WH).view_as(x_SBH) if ctx.needs_input_grad[0] else None
        weights_end = 3 + len(ctx.rows)
        none = (None,) * len(ctx.rows)
        d_weights, d_biases = none, none[: len(ctx.needs_input_grad) - weights_end]
        if ctx.needs_input_grad[3]:  # all of them are trained, or none
            d_weights = (grad_TW.T @ x_SBH.flatten(0, -2)).split(ctx.rows)
        if any(ctx.needs_input_grad[weights_end:]):
            d_biases = grad_TW.sum(0).split(ctx.rows)
        return d_x_SBH, None, None, *d_weights, *d_biases


def put_side_by_side(linears: Sequence[nn.Module]) -> None:
    """Move the weights of linears that have their memory already into one matrix, in this order."""
    weights = [linear.weight for linear in linears if type(linear) is nn.Linear]
    if len(weights) == len(linears):
        together = torch.cat([weight.detach() for weight in weights])
        for weight, part in zip(weights, together.split([len(weight) for weight in weights]), strict=True):
            weight.data = part


def find_joint(linears: Sequence[nn.Module]) -> tuple[Tensor, list[int]] | None:
    """The matrix [W, H] that the weights make up, and the linears' numbers in the order in which they lie in it.

    None where they do not lie side by side, are not torch's own linears, or are frozen in part.
    """
    weights = [linear.weight for linear in linears if type(linear) is nn.Linear]
    if len(weights) < len(linears) or len({weight.requires_grad for weight in weights}) > 1:
        return None
    order = sorted(range(len(weights)), key=lambda number: weights[number].data_ptr())
    inner, end = weights[0].shape[-1], weights[order[0]].data_ptr()
    for number in order:
        weight = weights[number]
        if weight.numel() == 0 or weight.data_ptr() != end or not weight.is_contiguous():
            return None
        end += weight.numel() * weight.element_size()
    first = weights[order[0]].detach()
    if len({weight.untyped_storage().data_ptr() for weight in weights}) > 1:
        return None  # neighbours by chance: neither keeps the other's memory
    return first.as_strided((sum(map(len, weights)), inner), (inner, 1)), order


def joint_outputs(
    x_SBH: Tensor,
    joint_WH: Tensor,
    order: Sequence[int],
    linears: Sequence[nn.Linear],
    product: Callable[..., tuple[Tensor, ...]] = JointProduct.apply,
) -> list[Tensor]:
    """The output of each linear, in their order."""
    placed = [linears[number] for number in order]
    if not torch.compiler.is_compiling():
        moved = placed[0].weight.data_ptr() != joint_WH.data_ptr()
        assert not moved, "weights have moved since they were found side by side"
    biases = [linear.bias for linear in placed if linear.bias is not None]
    rows = [linear.out_features for linear in placed]
    parts = product(x_SBH, joint_WH, rows, *(linear.weight for linear in placed), *biases)
    return [parts[order.index(number)] for number in range(len(linears))]
