"""Distributions over a vocabulary that may be split over ranks: a teacher's likeliest tokens, and how far a student is
from them.

Beside the K likeliest tokens, all others are one class, so nothing is renormalized: a student is neither drawn to give
the others nothing, nor told how they share what they have.

Shape suffixes: C tokens of a chunk, V vocabulary (this rank's part), K likeliest tokens, R ranks of a group.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from llmtrain.parallel.parts import VocabularyPart
from llmtrain.values.batch import SoftTargets

NONE = float("-inf")
"""The logit of what cannot be."""

LEAST = 1e-30
"""Of a sum that is divided by: what is left of it underflows where the others are sure of themselves."""


def likeliest(logits_CV: Tensor, part: VocabularyPart, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """(log probabilities [C, K] and ids [C, K] of the likeliest tokens, log probability [C] of all others).

    `logits_CV` are this rank's, in fp32, and are overwritten. Every rank of the vocabulary gets the same.
    """
    own_k = min(top_k, part.rows)
    own_CK, row_CK = logits_CV.topk(own_k, dim=-1)
    rest_C = logits_CV.new_full((len(logits_CV),), NONE)
    if part.rows:
        rest_C = logits_CV.scatter_(1, row_CK, NONE).logsumexp(-1)
    found_CK, id_CK, rest_RC = own_CK, row_CK + part.first, rest_C[None]
    if part.group is not None:
        # A rank may have fewer rows than are wanted: what it lacks is nobody's first choice.
        lacking = (0, top_k - own_k)
        found_CK = _side_by_side(torch.nn.functional.pad(own_CK, lacking, value=NONE), part.group)
        id_CK = _side_by_side(torch.nn.functional.pad(id_CK, lacking), part.group)
        rest_RC = _side_by_side(rest_C[:, None], part.group).T
    best_CK, place_CK = found_CK.topk(top_k, dim=-1)
    others_C = torch.cat((found_CK.scatter(1, place_CK, NONE), rest_RC.T), 1).logsumexp(-1)
    total_C = torch.logaddexp(best_CK.logsumexp(-1), others_C)
    return best_CK - total_C[:, None], id_CK.gather(1, place_CK), others_C - total_C


def _side_by_side(own_CN: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[C, R N]: what all ranks have, those of lower rank first."""
    return _gathered(own_CN, group).transpose(0, 1).flatten(1)


def _gathered(own_CN: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[R, C, N]: what each rank has."""
    parts = own_CN.new_empty(group.size() * len(own_CN), own_CN.shape[1])
    dist.all_gather_into_tensor(parts, own_CN.contiguous(), group=group)
    return parts.unflatten(0, (group.size(), -1))


def divergence(
    logits_CV: Tensor, part: VocabularyPart, targets: SoftTargets, scale_C: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """(KL(teacher || student) in nats, [C], and `scale_C` times its gradient by the logits), both in fp32.

    Of the student's predictions p at the targets' temperature t, with q the teacher's, r all classes' rest:
    d KL / d logit = (p - q) / t for the likeliest tokens, p (1 - q_r / p_r) / t for the others. Without `scale_C` there
    is no gradient. Every rank of the vocabulary gets the whole divergence, and the gradient of its own logits.
    """
    row_CK = targets.ids_TK.long() - part.first
    z_CV = logits_CV.float() / targets.temperature
    here_CK = (row_CK >= 0) & (row_CK < part.rows)
    row_CK = row_CK.clamp(0, max(0, part.rows - 1))  # legal in either case
    if part.rows:
        peak_C, at_CK = z_CV.amax(-1), z_CV.gather(1, row_CK) * here_CK
    else:
        peak_C, at_CK = z_CV.new_full((len(z_CV),), NONE), z_CV.new_zeros(row_CK.shape)
    z_CV.sub_(peak_C[:, None]).exp_()
    if part.rows:  # x - x is 0: what is left are the others, whose sum would be lost in a difference of large numbers
        z_CV.scatter_add_(1, row_CK, -(z_CV.gather(1, row_CK) * here_CK))
    rest_C, highest_C = z_CV.sum(-1), peak_C
    if part.group is not None:
        # One collective, as in the cross-entropy: sums below peaks of their own are brought below the highest.
        parts_RCN = _gathered(torch.cat((peak_C[:, None], rest_C[:, None], at_CK), 1), part.group)
        highest_C = parts_RCN[..., 0].amax(0)
        rest_C = (parts_RCN[..., 1] * (parts_RCN[..., 0] - highest_C).exp()).sum(0)
        at_CK = parts_RCN[..., 2:].sum(0)  # one rank has each, the others 0
    log_CK, rest_C = at_CK - highest_C[:, None], rest_C.clamp(min=LEAST)
    log_total_C = torch.logaddexp(log_CK.logsumexp(-1), rest_C.log())
    log_p_CK, log_p_rest_C = log_CK - log_total_C[:, None], rest_C.log() - log_total_C
    q_CK, q_rest_C = targets.log_probs_TK.exp(), targets.log_rest_T.exp()
    loss_C = (q_CK * (targets.log_probs_TK - log_p_CK)).sum(-1)
    # Where the teacher gives the others nothing, their part is 0, and its logarithm is not to be asked.
    loss_C += torch.where(q_rest_C > 0, q_rest_C * (targets.log_rest_T - log_p_rest_C), 0.0)
    if scale_C is None:
        return loss_C, None
    factor_C = scale_C / targets.temperature
    others_C = factor_C * (peak_C - highest_C).exp() * ((-log_total_C).exp() - q_rest_C / rest_C)
    z_CV.mul_(others_C[:, None])
    if part.rows:
        z_CV.scatter_add_(1, row_CK, here_CK * (log_p_CK.exp() - q_CK) * factor_C[:, None])
    return loss_C, z_CV
