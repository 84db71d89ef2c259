"""Weight gradients computed apart from the rest of the backward pass (Qi et al. 2023, section 1: B and W).

Of y = x W^T the backward pass computes d x = d y W, and leaves d W = d y^T x for later, as the very product that it
would have done. What is small stays in it: norms, biases, embeddings, routers. So does the head, which computes all of
its gradients with the loss, while a chunk's logits are at hand: to do one product later, it would have to keep them.

Shape suffixes: N rows, H in, F out, P pairs of a token and an expert, E experts.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmtrain.models.attention.joint_product import JointProduct
from llmtrain.models.compiled_graphs import outside_of_graphs
from llmtrain.models.experts.mixture import grouped_linear, grouped_weight_gradient

Counts = Tensor | list[int]
"""As in `grouped_linear`."""

Deferred = tuple[Sequence[nn.Parameter], Callable[[], Sequence[Tensor]]]
"""Weights, and what computes their gradients."""


class WeightGradients:
    """The weight gradients that backward passes have left for later, by micro-batch.

    `linear`, `grouped_linear` and `joint_product` stand in for the functions of these names.
    """

    def __init__(self) -> None:
        self._open: deque[Deferred] = deque()
        self._closed: deque[deque[Deferred]] = deque()
        # Stands for an input with a gradient where there is none, as in a layer behind frozen embeddings: else its
        # product would take no part in the backward pass.
        self._stand_in = torch.zeros((), requires_grad=True)

    def linear(self, x: Tensor, weight_FH: Tensor, bias_F: Tensor | None = None, two_steps: bool = False) -> Tensor:
        """`two_steps`: the bias is added to the product as it is rounded, as megatron-core does."""
        if not weight_FH.requires_grad:
            return linear(x, weight_FH, bias_F, two_steps)
        left = Left(weight_FH, self, two_steps)
        stand_in = None if x.requires_grad else self._stand_in
        return outside_of_graphs(DeferredLinear.apply, x, bias_F, stand_in, left)

    def grouped_linear(self, x_PH: Tensor, weight_EFH: Tensor, counts: Counts) -> Tensor:
        if not weight_EFH.requires_grad:
            return grouped_linear(x_PH, weight_EFH, counts)
        left = Left(weight_EFH, self)
        stand_in = None if x_PH.requires_grad else self._stand_in
        return outside_of_graphs(DeferredGroupedLinear.apply, x_PH, stand_in, left, counts)

    def joint_product(
        self, x_SBH: Tensor, joint_WH: Tensor, rows: Sequence[int], *parameters: Tensor
    ) -> tuple[Tensor, ...]:
        weights, biases = parameters[: len(rows)], parameters[len(rows) :]
        if not weights[0].requires_grad:  # all of them are trained, or none
            return JointProduct.apply(x_SBH, joint_WH, rows, *parameters)
        stand_in = None if x_SBH.requires_grad else self._stand_in
        left = Left(weights, self)
        return outside_of_graphs(DeferredJointProduct.apply, x_SBH, joint_WH, rows, stand_in, left, *biases)

    def add(self, weights: Sequence[nn.Parameter], compute: Callable[[], Sequence[Tensor]]) -> None:
        """Leave gradients for later; called in the backward pass. Until then `compute` holds their factors."""
        self._open.append((weights, compute))

    def close(self) -> None:
        """The backward pass of a micro-batch has ended: what it has left belongs together."""
        self._closed.append(self._open)
        self._open = deque()

    @torch.no_grad()
    def compute_oldest(self) -> None:
        """Compute and accumulate what the oldest micro-batch has left, in the order of its backward pass.

        It goes through autograd, as if the backward pass arrived at each weight: what waits for gradients there, such
        as sums over ranks that begin when a bucket is complete, sees the same as if it had not been left for later.
        """
        deferred = self._closed.popleft()
        while deferred:
            weights, compute = deferred.popleft()  # taken off first: factors are freed as soon as they are used
            torch.autograd.backward(weights, compute())


@dataclass(frozen=True, eq=False)
class Left:
    """A weight whose gradient is left for later, or several, and where. Not a tensor: as an input of the function the
    weight would be given a gradient by the backward pass, and what waits for that would take nothing for it."""

    weight: Any
    held: WeightGradients
    two_steps: bool = False


def linear(x: Tensor, weight_FH: Tensor, bias_F: Tensor | None, two_steps: bool) -> Tensor:
    if bias_F is None or not two_steps:
        return F.linear(x, weight_FH, bias_F)
    return F.linear(x, weight_FH) + bias_F


class DeferredLinear(torch.autograd.Function):
    """x W^T + b; backward, the gradient of W is left for later."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias_F: Tensor | None, stand_in: Tensor | None, left: Left) -> Tensor:
        ctx.save_for_backward(x)
        ctx.left = left
        return linear(x, left.weight, bias_F, left.two_steps)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        (x,), left, d_NF = ctx.saved_tensors, ctx.left, grads[0].flatten(0, -2)
        d_x = (d_NF @ left.weight).view_as(x) if ctx.needs_input_grad[0] else None
        d_bias_F = d_NF.sum(0) if ctx.needs_input_grad[1] else None
        kept = x.detach()
        left.held.add([left.weight], lambda: [d_NF.T @ kept.flatten(0, -2)])
        return d_x, d_bias_F, None, None


class DeferredGroupedLinear(torch.autograd.Function):
    """Rows times the transposed weight of their expert; backward, the gradient of the weights is left for later."""

    @staticmethod
    def forward(ctx: Any, x_PH: Tensor, stand_in: Tensor | None, left: Left, counts: Counts) -> Tensor:
        ctx.save_for_backward(x_PH)
        ctx.left, ctx.counts = left, counts
        return grouped_linear(x_PH, left.weight, counts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, None]:
        (x_PH,), left, counts, d_PF = ctx.saved_tensors, ctx.left, ctx.counts, grads[0]
        transposed_EHF = left.weight.detach().transpose(1, 2)
        d_x_PH = grouped_linear(d_PF, transposed_EHF, counts) if ctx.needs_input_grad[0] else None
        kept_PH = x_PH.detach()
        left.held.add([left.weight], lambda: [grouped_weight_gradient(d_PF, kept_PH, counts)])
        return d_x_PH, None, None, None


class DeferredJointProduct(torch.autograd.Function):
    """As `JointProduct`; backward, the gradients of the weights are left for later, still in one product."""

    @staticmethod
    def forward(
        ctx: Any,
        x_SBH: Tensor,
        joint_WH: Tensor,
        rows: Sequence[int],
        stand_in: Tensor | None,
        left: Left,
        *biases: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x_SBH)
        ctx.joint_WH, ctx.rows, ctx.left = joint_WH, rows, left
        return F.linear(x_SBH, joint_WH, torch.cat(biases) if biases else None).split(rows, -1)

    @staticmethod
    def backward(ctx: Any, *grads_SBO: Tensor) -> tuple[Tensor | None, ...]:
        (x_SBH,), rows, left = ctx.saved_tensors, ctx.rows, ctx.left
        grad_TW = torch.cat(grads_SBO, -1).flatten(0, -2)
        d_x_SBH = (grad_TW @ ctx.joint_WH).view_as(x_SBH) if ctx.needs_input_grad[0] else None
        trained = ctx.needs_input_grad[5:]
        d_biases = grad_TW.sum(0).split(rows) if any(trained) else (None,) * len(trained)
        kept = x_SBH.detach()
        left.held.add(left.weight, lambda: (grad_TW.T @ kept.flatten(0, -2)).split(rows))
        return d_x_SBH, None, None, None, None, *d_biases
