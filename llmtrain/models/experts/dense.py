"""A mixture of experts in which every expert does every token, for graphs that run elsewhere.

How many tokens an expert has depends on what they say, and a graph's sizes may not. So each expert does all, and what
was not chosen is weighted with 0: the same output, for num_experts / top_k times the work.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from llmtrain.models.experts.mixture import MoE
from llmtrain.models.experts.router import Router
from llmtrain.parallel.stateless_random import Draws


class Expert(nn.Module):
    """One of the stacked experts, with matrices of its own, as tools that round weights look for them."""

    def __init__(self, moe: MoE, number: int) -> None:
        super().__init__()
        experts = moe.experts
        self.activate = experts.activate
        self.up = nn.Parameter(experts.up[number])
        self.gate = None if experts.gate is None else nn.Parameter(experts.gate[number])
        self.down = nn.Parameter(experts.down[number])

    def forward(self, x_SBH: Tensor) -> Tensor:
        inputs = [F.linear(x_SBH, weight) for weight in (self.up, self.gate) if weight is not None]
        return F.linear(self.activate(*inputs), self.down)


class RouterWeights(nn.Module):
    """The router's part of it, as a module that a trace names: what it says stays exact where weights are rounded."""

    def __init__(self, router: Router) -> None:
        super().__init__()
        self.router = router

    def forward(self, x_SBH: Tensor) -> Tensor:
        return self.router.weights(x_SBH)


class DenseMoE(nn.Module):
    """Takes the place of a `MoE` in evaluation, without updates of its weights. Padding is done by experts as well."""

    def __init__(self, moe: MoE) -> None:
        super().__init__()
        self.router = RouterWeights(moe.router)
        self.experts = nn.ModuleList(Expert(moe, number) for number in range(moe.experts.up.shape[0]))
        self.shared = moe.shared

    def forward(
        self, x_SBH: Tensor, valid_BS: Tensor | None, draws: Draws | None, balance: float
    ) -> tuple[Tensor, None]:
        """(output, no report of the router). As `MoE.forward`."""
        weights_SBE = self.router(x_SBH)
        out_SBH = self.shared(x_SBH) if self.shared is not None else None
        for number, expert in enumerate(self.experts):
            done_SBH = expert(x_SBH) * weights_SBE[..., number, None].to(x_SBH.dtype)
            out_SBH = done_SBH if out_SBH is None else out_SBH + done_SBH
        assert out_SBH is not None, "a mixture has experts"
        return out_SBH, None
