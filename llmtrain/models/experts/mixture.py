"""A mixture of experts: in place of one MLP many, of which each token meets a few.

Shape suffixes: B micro-batch, S sequence, N tokens of this rank, P pairs of a token and an expert that does it,
E experts, H hidden, F inner width.

A token has up to four numbers on its way: its place in the whole micro-batch (the router's choice), in this rank's part
outside of blocks, among the N tokens inside of the block, and, once per chosen expert, among the P rows.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmtrain.config.model import ModelConfig
from llmtrain.config.parameters import expert_ffn_size
from llmtrain.models.experts.router import Router
from llmtrain.models.pointwise import MLP, Recompute, activated, build_pointwise, identity
from llmtrain.parallel.stateless_random import Draws


class Pairs(NamedTuple):
    """The pairs of a token and an expert, expert by expert. `slot_P` is the place of each among its token's pairs, of
    which there are `slots` at most."""

    token_P: Tensor
    expert_P: Tensor
    slot_P: Tensor
    slots: int
    num_tokens: int

    @staticmethod
    def of(chosen_NE: Tensor, per_token: int | None) -> "Pairs":
        """All pairs that are chosen, `per_token` of each token.

        Without that number the host waits for theirs: it is the size of the tensors that follow.
        """
        if per_token is None:
            slots = max(1, int(chosen_NE.sum(1).max()))
            expert_P, token_P = chosen_NE.T.nonzero(as_tuple=True)
        else:
            slots = per_token
            expert_P, token_P = torch.nonzero_static(chosen_NE.T, size=slots * len(chosen_NE)).unbind(1)
        place_NE = chosen_NE.cumsum(1) - 1
        return Pairs(token_P, expert_P, place_NE[token_P, expert_P], slots, chosen_NE.shape[0])

    def gathered(self, x_NH: Tensor) -> Tensor:
        """[P, H]: the row of each pair's token."""
        return x_NH[self.token_P]

    def summed(self, x_PH: Tensor) -> Tensor:
        """[N, H]: the sum of each token's pairs, in the order of the experts whatever the device."""
        place_P = self.token_P * self.slots + self.slot_P
        spread = x_PH.new_zeros(self.num_tokens * self.slots, x_PH.shape[1]).index_copy(0, place_P, x_PH)
        return spread.view(self.num_tokens, self.slots, -1).sum(1)


class Gather(torch.autograd.Function):
    """Rows of tokens to rows of pairs; backward, d x[n] = sum of d y[p] over the pairs p of token n.

    By hand, because autograd's own backward of indexing adds up in no fixed order on a GPU.
    """

    @staticmethod
    def forward(ctx: Any, x_NH: Tensor, pairs: Pairs) -> Tensor:
        ctx.pairs = pairs
        return pairs.gathered(x_NH)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.pairs.summed(grads[0]), None


class Sum(torch.autograd.Function):
    """Rows of pairs to their sums by token; backward, d x[p] = d y[token of p]."""

    @staticmethod
    def forward(ctx: Any, x_PH: Tensor, pairs: Pairs) -> Tensor:
        ctx.pairs = pairs
        return pairs.summed(x_PH)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.pairs.gathered(grads[0]), None


class WithLoss(torch.autograd.Function):
    """Passes a tensor on; backward, a loss beside it gets `scale` as its gradient.

    So a balancing loss joins the backward pass where it arises, also on a pipeline stage that never sees the main loss.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        return grads[0], torch.full((), ctx.scale, dtype=torch.float32, device=grads[0].device), None


class TokenDispatcher(Protocol):
    """Brings rows to the ranks that hold their experts, and back."""

    def to_experts(self, x_PH: Tensor, counts_E: Tensor) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
        """Rows for this rank's experts, expert by expert, how many each has, and the way back for as many rows."""
        ...


class LocalExperts:
    """All experts are here."""

    def to_experts(self, x_PH: Tensor, counts_E: Tensor) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
        return x_PH, counts_E, lambda rows: rows


Product = Callable[[Tensor, Tensor, Tensor | list[int]], Tensor]
"""As `grouped_linear`."""


class Experts(nn.Module):
    """MLPs of equal shape, stacked: weights are [expert, out, in]."""

    def __init__(self, config: ModelConfig, recompute: Recompute = "none") -> None:
        super().__init__()
        assert config.moe is not None
        shape = (config.moe.num_experts, expert_ffn_size(config), config.hidden_size)
        self.pointwise = build_pointwise(config)
        self.recompute: Recompute = recompute
        self.gate = nn.Parameter(torch.empty(shape)) if config.gated else None
        self.up = nn.Parameter(torch.empty(shape))
        self.down = nn.Parameter(torch.empty(shape[0], shape[2], shape[1]))
        self.inner = ("up", "gate") if config.gated else ("up",)
        self.product: Product = grouped_linear
        self.products: dict[str, Product] = {}
        """In place of it, by the name of the weight."""
        self.update_scale = 0.0
        """The factor of the weights' low-rank updates, where there are some: see models/low_rank.py."""
        for name in ("up", "gate", "down"):
            self.register_parameter(f"{name}_lora_a", None)
            self.register_parameter(f"{name}_lora_b", None)

    def forward(self, x_PH: Tensor, counts_E: Tensor) -> Tensor:
        """Rows lie expert by expert, `counts_E` of each."""
        # On the CPU, and in fp32, the host waits: rows are split by numbers of the host.
        counts = counts_E.cumsum(0).to(torch.int32) if runs_grouped(x_PH) else counts_E.tolist()
        inputs = [self._multiplied(name, x_PH, counts) for name in self.inner]
        recompute = self.recompute if self.training else "none"
        return activated(self.activate, lambda inner: self._multiplied("down", inner, counts), inputs, recompute)

    def _multiplied(self, name: str, x_PH: Tensor, counts: Tensor | list[int]) -> Tensor:
        """Rows times the weights of a name, with their updates."""
        y_PF = self.products.get(name, self.product)(x_PH, getattr(self, name), counts)
        a_ERH, b_EFR = getattr(self, f"{name}_lora_a"), getattr(self, f"{name}_lora_b")
        if a_ERH is None:
            return y_PF
        # Nothing is summed over tensor ranks between the two: what leaves the block is.
        return y_PF + self.product(self.product(x_PH, a_ERH, counts) * self.update_scale, b_EFR, counts)

    def activate(self, up: Tensor, gate: Tensor | None = None) -> Tensor:
        return self.pointwise(up) if gate is None else self.pointwise(gate) * up


def runs_grouped(x_PH: Tensor) -> bool:
    """True where one kernel multiplies the rows of all experts: it is there for bf16 on GPUs."""
    return x_PH.is_cuda and x_PH.dtype == torch.bfloat16


def grouped_linear(x_PH: Tensor, weight_EFH: Tensor, counts: Tensor | list[int]) -> Tensor:
    """[P, F]: rows times the transposed weight of their expert. An expert without rows has a gradient of zeros.

    `counts` are the ends of the experts' rows on the device, for the one kernel, or their numbers on the host.
    """
    if isinstance(counts, Tensor):
        return F.grouped_mm(x_PH, weight_EFH.transpose(1, 2), offs=counts)
    parts = x_PH.split(counts)
    return torch.cat([part @ weight.T for part, weight in zip(parts, weight_EFH, strict=True)])


def grouped_weight_gradient(d_PF: Tensor, x_PH: Tensor, counts: Tensor | list[int]) -> Tensor:
    """[E, F, H]: what autograd computes for the weights of `grouped_linear`, of each expert d y^T x over its rows."""
    if isinstance(counts, Tensor):
        return F.grouped_mm(d_PF.T, x_PH, offs=counts)
    parts = zip(d_PF.split(counts), x_PH.split(counts), strict=True)
    return torch.stack([d_part.T @ x_part for d_part, x_part in parts])


class MoE(nn.Module):
    """The chosen experts' outputs, weighted and summed, and those of the shared ones, which every token meets."""

    def __init__(self, config: ModelConfig, site: str, recompute: Recompute = "none") -> None:
        super().__init__()
        assert config.moe is not None
        self.router = Router(config, site)
        self.experts = Experts(config, recompute)
        self.dispatcher: TokenDispatcher = LocalExperts()
        self.enter: Callable[[Tensor], Tensor] = identity
        """Into the region where tensor ranks split the experts: the whole sequence of this context rank."""
        self.leave: Callable[[Tensor], Tensor] = identity
        """Out of it: sums the parts of the ranks."""
        shared = config.moe.num_shared_experts * expert_ffn_size(config)
        self.shared = None
        if shared:
            plain = config.with_keys({"ffn_hidden_size": shared, "bias": False})
            self.shared = MLP(plain, recompute)

    def forward(
        self, x_SBH: Tensor, valid_BS: Tensor | None, draws: Draws | None, balance: float
    ) -> tuple[Tensor, Tensor]:
        """(output, the router's report). Backward, the balancing losses join in with the factor `balance`."""
        routing = self.router(x_SBH, valid_BS, draws)
        # The router has seen this rank's own tokens (s). Inside of the block a rank has the tokens of all its tensor
        # ranks, and their weights, whose gradients are parts as well. The choice covers the whole micro-batch (S).
        inner_SBH, weights_SBE = self.enter(x_SBH), self.enter(routing.weights_sBE)
        inside = self.router.parts.inside(routing.chosen_SBE.shape[0])
        chosen_NE = inside.of(routing.chosen_SBE).flatten(0, 1)
        pairs = Pairs.of(chosen_NE, routing.per_token)
        # Rows travel to the ranks of their experts, are done there, and come back in the order of the pairs. Every rank
        # calls its experts, with no rows too: the others wait in the same exchange.
        rows, counts, back = self.dispatcher.to_experts(Gather.apply(inner_SBH.flatten(0, 1), pairs), chosen_NE.sum(0))
        done_PH = back(self.experts(rows, counts))
        weights_P = weights_SBE.flatten(0, 1)[pairs.token_P, pairs.expert_P]
        weighted_PH = done_PH * weights_P[:, None].to(done_PH.dtype)
        out_SBH = self.leave(Sum.apply(weighted_PH, pairs).view_as(inner_SBH))
        if self.shared is not None:
            out_SBH = out_SBH + self.shared(x_SBH, draws)
        if balance and torch.is_grad_enabled():
            out_SBH = WithLoss.apply(out_SBH, routing.loss, balance)
        return out_SBH, routing.report
