"""The output head and the cross-entropy in one, chunk by chunk: fp32 logits of the whole batch never exist.

Shape suffixes: B micro-batch, S sequence, T tokens of a micro-batch, C tokens of a chunk, V vocabulary, H hidden.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from llmtrain.config.model import ModelConfig
from llmtrain.models.pointwise import build_norm, build_pointwise
from llmtrain.parallel.parts import VocabularyPart
from llmtrain.parallel.soft_targets import divergence
from llmtrain.parallel.stateless_random import Draws
from llmtrain.values.batch import Batch, SoftTargets


class MlmHead(nn.Module):
    """A dense layer, the activation and a norm; and the bias that is added to the logits (Devlin et al. 2019)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.pointwise = build_pointwise(config)
        self.bias = nn.Parameter(torch.empty(config.padded_vocab_size))
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm = build_norm(config)

    def forward(self, x_SBH: Tensor) -> Tensor:
        return self.norm(self.pointwise(self.dense(x_SBH)))


class ChunkGradients(NamedTuple):
    """The places for a chunk's gradients: its rows of the hidden states, and sums for the weight and the bias, in fp32
    where there are several chunks to sum. In that of the weight the first chunk finds nothing yet."""

    hidden_CH: Tensor
    weight_VH: Tensor | None
    bias_V: Tensor | None
    first: bool


class HeadTargets(NamedTuple):
    """Of each token the label to predict (a negative one: none), and where there is a teacher, what it predicts."""

    labels_T: Tensor
    soft: SoftTargets | None = None

    def chunk(self, tokens: slice) -> "HeadTargets":
        """Those of some of the tokens."""
        return HeadTargets(self.labels_T[tokens], None if self.soft is None else self.soft.chunk(tokens))


class Head(NamedTuple):
    """The output matrix and, where there is one, the bias of the logits."""

    weight_VH: Tensor
    bias_V: Tensor | None


@dataclass(frozen=True)
class Objective:
    """The computation of the loss: gradients are multiplied by `scale`, and `chunk_tokens` tokens are done at a
    time. `draws` are for the dropout before a head for labels."""

    scale: float
    chunk_tokens: int
    part: VocabularyPart
    draws: Draws | None = None


def chunk_logits(hidden_CH: Tensor, head: Head) -> Tensor:
    """[C, V]; in fp32 where there is a bias."""
    logits_CV = hidden_CH @ head.weight_VH.T
    return logits_CV if head.bias_V is None else logits_CV.float() + head.bias_V.float()


def chunk_loss(
    hidden_CH: Tensor, head: Head, targets: HeadTargets, objective: Objective, grads: ChunkGradients | None
) -> Tensor:
    """The sum of the losses over the chunk's targets, in fp32; adds `scale` times the gradients of their mixture.

    One loss is -log softmax(h W^T + b)[label]; with a teacher the divergence from what it predicts stands behind it.
    """
    valid_C, label_C = targets.labels_T >= 0, targets.labels_T.clamp(min=0)
    weight_VH = head.weight_VH
    logits_CV = chunk_logits(hidden_CH, head)
    scale_C, soft = None if grads is None else valid_C * objective.scale, targets.soft
    soft_C, d_soft_CV = None, None
    if soft is not None:  # first: the cross-entropy overwrites the logits
        # By the square of the temperature gradients stay as large as without one (Hinton et al. 2015, section 2).
        soft_scale_C = None if scale_C is None else scale_C * (soft.weight * soft.temperature**2)
        soft_C, d_soft_CV = divergence(logits_CV, objective.part, soft, soft_scale_C)
        scale_C = None if scale_C is None else scale_C * (1 - soft.weight)
    loss_C, d_logits_CV = objective.part.cross_entropy(logits_CV, label_C, scale_C)
    if d_soft_CV is not None and d_logits_CV is not None:
        d_logits_CV.add_(d_soft_CV)
    if grads is not None and d_logits_CV is not None:
        del logits_CV  # as large as their gradient
        if grads.bias_V is not None:
            grads.bias_V.add_(d_logits_CV.sum(0))
        d_logits_CV = d_logits_CV.to(hidden_CH.dtype)
        # d h = d logits W, and d W = sum over the chunks of d logits^T h.
        torch.mm(d_logits_CV, weight_VH, out=grads.hidden_CH)
        if grads.weight_VH is None:  # frozen
            pass
        elif grads.weight_VH.dtype == hidden_CH.dtype:
            grads.weight_VH.addmm_(d_logits_CV.T, hidden_CH, beta=0 if grads.first else 1)
        elif grads.first:
            grads.weight_VH.copy_(d_logits_CV.T @ hidden_CH)
        else:
            grads.weight_VH.add_(d_logits_CV.T @ hidden_CH)
    losses_C = loss_C if soft_C is None else torch.stack((loss_C, soft_C))
    return (losses_C * valid_C).sum(-1)


class HeadCrossEntropy(torch.autograd.Function):
    """Computes the gradients together with the loss, while a chunk's logits are at hand: nothing is computed twice."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: Tensor,
        weight_VH: Tensor,
        targets: HeadTargets,
        objective: Objective,
        bias_V: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        with_gradients = any(ctx.needs_input_grad)
        d_hidden_TH = torch.empty_like(hidden_TH) if with_gradients else None
        d_weight_VH, d_bias_V = None, None
        if ctx.needs_input_grad[1]:
            # The sum of one chunk alone is rounded once in either type, and is half as large in the weight's.
            one_chunk = hidden_TH.shape[0] <= objective.chunk_tokens
            d_weight_VH = torch.empty_like(weight_VH, dtype=None if one_chunk else torch.float32)
        if bias_V is not None and ctx.needs_input_grad[4]:
            d_bias_V = torch.zeros_like(bias_V, dtype=torch.float32)
        soft = targets.soft
        loss_sum = torch.zeros(() if soft is None else (2,), dtype=torch.float32, device=hidden_TH.device)
        for start in range(0, hidden_TH.shape[0], objective.chunk_tokens):
            chunk = slice(start, start + objective.chunk_tokens)
            grads = None
            if d_hidden_TH is not None:
                grads = ChunkGradients(d_hidden_TH[chunk], d_weight_VH, d_bias_V, first=start == 0)
            loss_sum += chunk_loss(hidden_TH[chunk], Head(weight_VH, bias_V), targets.chunk(chunk), objective, grads)
        if d_hidden_TH is not None:
            weight_grad = None if d_weight_VH is None else d_weight_VH.to(weight_VH.dtype)
            bias_grad = None if d_bias_V is None or bias_V is None else d_bias_V.to(bias_V.dtype)
            ctx.save_for_backward(d_hidden_TH, weight_grad, bias_grad)
        ctx.mark_non_differentiable(loss_sum)
        mixed = loss_sum
        if soft is not None:
            mixed = (1 - soft.weight) * loss_sum[0] + soft.weight * soft.temperature**2 * loss_sum[1]
        return mixed * objective.scale, loss_sum

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, Tensor | None]:
        # The gradients are there since the forward pass; in place, because a loss goes backward once.
        scaled = [None if grad is None else grad.mul_(grad_outputs[0]) for grad in ctx.saved_tensors]
        return scaled[0], scaled[1], None, None, scaled[2]


def head_cross_entropy(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    labels_T: Tensor,
    objective: Objective,
    bias_V: Tensor | None = None,
    soft: SoftTargets | None = None,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the head's predictions, summed over the targets; a negative label is no target.

    Returns (loss_sum * scale, to call backward on; loss_sum, fp32, detached). With `soft` targets the first is that of
    the mixture, and the second is [2]: the cross-entropy, and the divergence from the teacher at its temperature.

    The scale is known before the forward pass (loss scale / valid tokens of the step), and applied before gradients are
    rounded to a low precision. The weight has the rows of `objective.part`: padded rows take no part in the softmax.
    Where the vocabulary is split, every rank gets the whole loss, and a gradient for the hidden states that is to be
    summed over the ranks.
    """
    return HeadCrossEntropy.apply(hidden_TH, weight_VH, HeadTargets(labels_T, soft), objective, bias_V)


@torch.no_grad()
def text_sums(hidden_TH: Tensor, head: Head, labels_T: Tensor, objective: Objective, batch: Batch) -> Tensor:
    """[1 + 2 x texts] in fp64: the sum of the loss over the targets, and of each text its own, and how many of its
    tokens were not the likeliest. `T` are the positions of this rank, those of a batch's rows in turn."""
    assert batch.texts_B is not None
    place_N = (labels_T >= 0).nonzero()[:, 0]  # the host waits: most positions of a task's texts are no targets
    row_N, label_N = place_N % len(batch.texts_B), labels_T[place_N]
    sums = hidden_TH.new_zeros(2, batch.num_texts, dtype=torch.float64)
    for start in range(0, len(place_N), objective.chunk_tokens):
        chunk = slice(start, start + objective.chunk_tokens)
        logits_CV, labels_C = chunk_logits(hidden_TH[place_N[chunk]], head), label_N[chunk]
        missed_C = objective.part.likeliest(logits_CV) != labels_C
        loss_C, _ = objective.part.cross_entropy(logits_CV, labels_C, None)  # last: it may overwrite the logits
        sums.index_add_(1, batch.texts_B[row_N[chunk]], torch.stack((loss_C.double(), missed_C.double())))
    return torch.cat((sums[0].sum()[None], sums.flatten()))
