"""Routing: which tokens go to which experts, and what keeps the experts equally busy.

What is decided depends on a whole micro-batch and on nothing else: tokens count in the order of (sample, position),
ties go to the lower number, and everything is fp32. A rank that holds a part of the sequence gathers the scores of the
others before it decides.

Shape suffixes: B micro-batch, S sequence (s: this rank's part), N tokens of a micro-batch, E experts, H hidden.
"""

from math import ceil
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmtrain.config.model import ModelConfig, MoeConfig
from llmtrain.parallel.parts import WHOLE, HeldPositions, SequenceParts
from llmtrain.parallel.stateless_random import Draws, Places, Span, site_key


class Routing(NamedTuple):
    """A router's decision. A tuple: DeepSpeed searches tuples for the tensors whose backward pass it waits for.

    `weights_sBE` are this rank's factors of the experts' outputs, differentiable, 0 where an expert is not chosen.
    `chosen_SBE` says for the whole micro-batch which expert does which token. `loss` is this rank's part of the
    balancing losses, weighted by their coefficients. `report` has this rank's sums, detached, see `RouterReport`.
    `per_token` is the number of experts of every token; None where that differs.
    """

    weights_sBE: Tensor
    chosen_SBE: Tensor
    loss: Tensor
    report: Tensor
    per_token: int | None


class RouterReport(NamedTuple):
    """One layer's figures: sums over tokens and micro-batches, and of losses the sums over micro-batches."""

    tokens: float
    dropped: float
    """Choices that found no room."""
    entropy: float
    aux_loss: float
    z_loss: float
    load_E: Tensor
    """The number of times that each expert was wanted."""

    @staticmethod
    def of(sums: Tensor) -> "RouterReport":
        return RouterReport(*sums[:NUM_SCALARS].tolist(), load_E=sums[NUM_SCALARS:])


NUM_SCALARS = 5
"""Entries of a report before the experts' loads."""


class Choice(NamedTuple):
    """The pairs of token and expert that are wanted, and those of them that find room."""

    wanted_NE: Tensor
    kept_NE: Tensor


class Router(nn.Module):
    """One linear layer in fp32, a softmax, and the choice."""

    def __init__(self, config: ModelConfig, site: str) -> None:
        super().__init__()
        assert config.moe is not None
        self.moe = config.moe
        self.jitter_site = site_key(site, "jitter")
        self.parts: SequenceParts = WHOLE
        """The part of the sequence that this rank holds; set by the engines."""
        self.weight = nn.Parameter(torch.empty(config.moe.num_experts, config.hidden_size))
        self.bias_E: Tensor | None = None
        """Added to the probabilities for the choice alone. No state of the module: the engines keep it."""

    def forward(self, x_sBH: Tensor, valid_BS: Tensor | None, draws: Draws | None) -> Routing:
        """`valid_BS` is False where a position of the whole sequence is padding, which no expert does."""
        logits_sBE = F.linear(self.jittered(x_sBH.float(), draws), self.weight.float())
        probabilities_sBE = logits_sBE.softmax(-1)
        # s: this rank's own tokens. S: those of the whole micro-batch, among which capacity and ties are decided.
        # The choice has no gradient, so the gathered probabilities need none: weights are taken from the own ones.
        whole_SBE = self.parts.gather(probabilities_sBE)
        own = self.parts.own(whole_SBE.shape[0])
        valid_SB = torch.ones_like(whole_SBE[..., 0], dtype=torch.bool) if valid_BS is None else valid_BS.T
        wanted_SBE, kept_SBE = self.choose(whole_SBE, valid_SB, trains=draws is not None)
        weights_sBE = self.weighted(probabilities_sBE, own.of(wanted_SBE), own.of(kept_SBE))
        loss, losses = self.balance_losses(logits_sBE, probabilities_sBE, wanted_SBE, valid_SB, own)
        valid_sB1 = own.of(valid_SB)[..., None]
        dropped = own.of(wanted_SBE & ~kept_SBE).sum()
        entropy = -(probabilities_sBE * logits_sBE.log_softmax(-1) * valid_sB1).sum()
        scalars = torch.stack((valid_sB1.sum().float(), dropped.float(), entropy, *losses)).detach()
        report = torch.cat((scalars, own.of(wanted_SBE).sum((0, 1)).float()))
        dropless = self.moe.router != "expert_choice" and (draws is None or self.moe.capacity_factor is None)
        per_token = self.moe.choices if dropless and valid_BS is None else None
        return Routing(weights_sBE, kept_SBE, loss, report, per_token)

    def weights(self, x_SBH: Tensor) -> Tensor:
        """[S, B, E]: the factors of the experts' outputs where no expert is ever full and this rank has all tokens."""
        probabilities_SBE = F.linear(x_SBH.float(), self.weight.float()).softmax(-1)
        scores_SBE = probabilities_SBE if self.bias_E is None else probabilities_SBE + self.bias_E
        wanted_NE = wanted_by_tokens(scores_SBE.flatten(0, 1), self.moe.choices).any(0)
        wanted_SBE = wanted_NE.view_as(probabilities_SBE)
        return self.weighted(probabilities_SBE, wanted_SBE, wanted_SBE)

    def weighted(self, probabilities: Tensor, wanted: Tensor, kept: Tensor) -> Tensor:
        """[..., E]: probabilities of what is kept, as shares of what is wanted where the configuration says so."""
        weights = torch.where(kept, probabilities, 0.0)
        if self.moe.router == "top_k" and self.moe.normalize_weights:
            total = torch.where(wanted, probabilities, 0.0).sum(-1, keepdim=True)
            weights = weights / total.clamp(min=torch.finfo(torch.float32).tiny)
        return weights

    def jittered(self, x_sBH: Tensor, draws: Draws | None) -> Tensor:
        """In training, the input times uniform numbers within 1 +- jitter (Fedus et al. 2021, section 2.4)."""
        if draws is None or not self.moe.jitter:
            return x_sBH
        spans: list[Places] = [Span(0, size) for size in x_sBH.shape]
        if draws.sequence is not None:
            spans[0] = draws.sequence
        return x_sBH * (1 + self.moe.jitter * (2 * draws.uniform(self.jitter_site, x_sBH.shape, spans) - 1))

    @torch.no_grad()
    def choose(self, probabilities_SBE: Tensor, valid_SB: Tensor, trains: bool) -> tuple[Tensor, Tensor]:
        """(wanted, kept), [S, B, E] each, for the whole micro-batch."""
        shape = probabilities_SBE.transpose(0, 1).shape
        scores_NE = probabilities_SBE.transpose(0, 1).flatten(0, 1)
        if self.bias_E is not None:
            scores_NE = scores_NE + self.bias_E
        valid_N = valid_SB.T.flatten()
        # The size of a tensor, not its content: who takes part in a micro-batch is known to the host.
        room = capacity(self.moe, len(valid_N))
        if self.moe.router == "expert_choice":
            choice = experts_choose(scores_NE, valid_N, room)
        else:
            limited = trains and self.moe.capacity_factor is not None
            choice = tokens_choose(scores_NE, valid_N, self.moe.choices, room if limited else None)
        wanted_BSE, kept_BSE = (found.view(shape) for found in choice)
        return wanted_BSE.transpose(0, 1), kept_BSE.transpose(0, 1)

    def balance_losses(
        self, logits_sBE: Tensor, probabilities_sBE: Tensor, wanted_SBE: Tensor, valid_SB: Tensor, own: HeldPositions
    ) -> tuple[Tensor, list[Tensor]]:
        """This rank's part of the weighted sum, and of the load-balancing and the z-loss; they sum over the ranks.

        Load balancing: E sum_e f_e P_e, where f_e is the share of the choices that fell on expert e, and P_e its mean
        probability: 1 where all is equal (Fedus et al. 2021, eq. 4). z: the mean square of log sum exp of the logits
        (Zoph et al. 2022, eq. 5).
        """
        num_tokens = valid_SB.sum().clamp(min=1)
        wanted_E = wanted_SBE.sum((0, 1)).float()
        share_E = wanted_E / wanted_E.sum().clamp(min=1)  # counts: gradients flow through P_e alone
        valid_sB = own.of(valid_SB)
        mean_E = (probabilities_sBE * valid_sB[..., None]).sum((0, 1)) / num_tokens
        aux_loss = len(share_E) * (share_E * mean_E).sum()
        z_loss = (logits_sBE.logsumexp(-1).square() * valid_sB).sum() / num_tokens
        return self.moe.aux_loss_coeff * aux_loss + self.moe.z_loss_coeff * z_loss, [aux_loss, z_loss]


def capacity(moe: MoeConfig, num_tokens: int) -> int:
    """Tokens of a micro-batch that one expert takes."""
    return min(num_tokens, max(1, ceil(num_tokens * moe.choices / moe.num_experts * (moe.capacity_factor or 1.0))))


def tokens_choose(scores_NE: Tensor, valid_N: Tensor, top_k: int, room: int | None) -> Choice:
    """Each token wants its `top_k` best experts. First choices find room before second ones, in the tokens' order."""
    wanted_KNE = wanted_by_tokens(scores_NE, top_k) & valid_N[None, :, None]
    wanted_NE = wanted_KNE.any(0)
    if room is None:
        return Choice(wanted_NE, wanted_NE)
    queue = wanted_KNE.flatten(0, 1)  # all first choices in the tokens' order, then all second ones
    place = queue.cumsum(0)
    return Choice(wanted_NE, (queue & (place <= room)).view_as(wanted_KNE).any(0))


def wanted_by_tokens(scores_NE: Tensor, top_k: int) -> Tensor:
    """[K, N, E]: the best expert of each token, its second best one, and so on."""
    # A stable sort, not topk: ties go to the lower number on every device.
    best_NK = scores_NE.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    return F.one_hot(best_NK.T, scores_NE.shape[1]).bool()


def experts_choose(scores_NE: Tensor, valid_N: Tensor, room: int) -> Choice:
    """Each expert takes its `room` best tokens."""
    scores_NE = scores_NE.masked_fill(~valid_N[:, None], float("-inf"))
    best_RE = scores_NE.sort(dim=0, descending=True, stable=True).indices[:room]
    wanted_NE = torch.zeros_like(scores_NE, dtype=torch.bool).scatter_(0, best_RE, True) & valid_N[:, None]
    return Choice(wanted_NE, wanted_NE)


def bias_name(layer: str) -> str:
    """The name of a router's bias in checkpoints: a buffer, in steps of bias_update_rate."""
    return f"{layer}.moe.router.bias"
