"""The output head and the cross-entropy in one, chunk by chunk: fp32 logits of the whole batch never exist.

Shape suffixes: T tokens of a micro-batch, C tokens of a chunk, V vocabulary, H hidden.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor


class ChunkGradients(NamedTuple):
    """Where a chunk leaves its gradients: rows of the hidden states, and an fp32 sum for the weight."""

    hidden_CH: Tensor
    weight_VH: Tensor


def chunk_loss(hidden_CH: Tensor, weight_VH: Tensor, labels_C: Tensor, scale: float, grads: ChunkGradients | None) -> Tensor:
    """Sum of -log softmax(h W^T)[label] over the chunk's targets, in fp32; adds `scale` times its gradients."""
    valid_C = labels_C >= 0
    targets_C1 = labels_C.clamp(min=0)[:, None]
    logits_CV = (hidden_CH @ weight_VH.T).float()
    log_sum_C = logits_CV.logsumexp(-1)
    losses_C = log_sum_C - logits_CV.gather(1, targets_C1)[:, 0]
    if grads is not None:
        probabilities_CV = logits_CV.sub_(log_sum_C[:, None]).exp_()
        probabilities_CV.scatter_add_(1, targets_C1, probabilities_CV.new_full(targets_C1.shape, -1.0))
        d_logits_CV = probabilities_CV.mul_((valid_C * scale)[:, None]).to(hidden_CH.dtype)
        torch.mm(d_logits_CV, weight_VH, out=grads.hidden_CH)
        if grads.weight_VH.dtype == hidden_CH.dtype:
            grads.weight_VH.addmm_(d_logits_CV.T, hidden_CH)
        else:
            grads.weight_VH.add_(d_logits_CV.T @ hidden_CH)
    return (losses_C * valid_C).sum()


class HeadCrossEntropy(torch.autograd.Function):
    """Computes the gradients together with the loss, while a chunk's logits are at hand: nothing is computed twice."""

    @staticmethod
    def forward(
        ctx: Any, hidden_TH: Tensor, weight_VH: Tensor, labels_T: Tensor, scale: float, chunk_tokens: int
    ) -> tuple[Tensor, Tensor]:
        with_gradients = any(ctx.needs_input_grad)
        d_hidden_TH = torch.empty_like(hidden_TH) if with_gradients else None
        d_weight_VH = torch.zeros_like(weight_VH, dtype=torch.float32) if with_gradients else None
        loss_sum = torch.zeros((), dtype=torch.float32, device=hidden_TH.device)
        for start in range(0, hidden_TH.shape[0], chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            grads = None
            if d_hidden_TH is not None and d_weight_VH is not None:
                grads = ChunkGradients(d_hidden_TH[chunk], d_weight_VH)
            loss_sum += chunk_loss(hidden_TH[chunk], weight_VH, labels_T[chunk], scale, grads)
        if d_hidden_TH is not None and d_weight_VH is not None:
            ctx.save_for_backward(d_hidden_TH, d_weight_VH.to(weight_VH.dtype))
        ctx.mark_non_differentiable(loss_sum)
        return loss_sum * scale, loss_sum

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        d_hidden_TH, d_weight_VH = ctx.saved_tensors
        return d_hidden_TH * grad_outputs[0], d_weight_VH * grad_outputs[0], None, None, None


def head_cross_entropy(
    hidden_TH: Tensor, weight_VH: Tensor, labels_T: Tensor, scale: float, chunk_tokens: int
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the head's predictions, summed over the targets; a negative label is no target.

    Returns (loss_sum * scale, to call backward on; loss_sum, fp32, detached). `scale` is known before the forward pass
    (loss scale / valid tokens of the step), and applied before gradients are rounded to a low precision. Pass only the
    rows of the weight that are real tokens: padded rows then take no part in the softmax.
    """
    objective, loss_sum = HeadCrossEntropy.apply(hidden_TH, weight_VH, labels_T, scale, chunk_tokens)  # type: ignore[misc]
    return objective, loss_sum
