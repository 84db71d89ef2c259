"""The choice of the next token from its scores, and the number that is drawn for it.

Shape suffix: V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from llmtrain.errors import ConfigError
from llmtrain.values.keyed_hash import MASK_64, derived_key

LEAST_TEMPERATURE = 1e-6
"""Logits that are divided by less leave the range of their type."""
LARGEST_TEMPERATURE = 100.0
"""Far below it all tokens are about as likely."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: the likeliest one at temperature 0, else drawn from what top_k, top_p and min_p
    leave.

    `top_k` 0, `top_p` 1 and `min_p` 0 leave everything. Draws follow from the seed, the number of the text among those
    of one prompt, and the token's position, so that no other text changes them. Raises ConfigError for values outside
    their ranges.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        allowed = f"0 (greedy), or from {LEAST_TEMPERATURE:g} to {LARGEST_TEMPERATURE:g}"
        tempered = self.temperature == 0 or LEAST_TEMPERATURE <= self.temperature <= LARGEST_TEMPERATURE
        ranges = (
            ("temperature", self.temperature, tempered, allowed),
            ("top-k", self.top_k, self.top_k >= 0, "0 (off) or more"),
            ("top-p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min-p", self.min_p, 0 <= self.min_p < 1, "0 (off) or more, and below 1"),
        )
        faults = [f"--{name} {value}: must be {allowed}." for name, value, legal, allowed in ranges if not legal]
        if faults:
            raise ConfigError("\n".join(faults))


def drawn(seed: int, text: int, position: int) -> float:
    """The uniform number in [0, 1) for one token of one text."""
    return ((derived_key("sampling", seed, text, position) & MASK_64) >> 11) / (1 << 53)


def choose(logits_V: Tensor, sampling: Sampling, uniform: float) -> int:
    """The next token: where the cumulative probability of what is left exceeds `uniform`, the likeliest first.

    top_p keeps the fewest likeliest tokens with that much probability (Holtzman et al. 2020), min_p those with that
    share of the likeliest one's (Nguyen et al. 2024).
    """
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    probabilities = (logits_V.double() / sampling.temperature).softmax(-1)
    size = min(sampling.top_k or len(probabilities), len(probabilities))
    # A stable sort: equal ones in the order of their ids, on every device.
    order = probabilities.sort(descending=True, stable=True).indices[:size]
    probabilities = probabilities[order]
    kept = torch.ones_like(probabilities, dtype=torch.bool)
    if sampling.top_p < 1:
        before = probabilities.cumsum(-1) - probabilities
        kept = before < sampling.top_p * probabilities.sum()
    if sampling.min_p:
        kept &= probabilities >= sampling.min_p * probabilities[0]
    kept[0] = True  # the likeliest stays, however small the shares are
    sums = torch.where(kept, probabilities, 0.0).cumsum(-1)
    last = int(kept.sum()) - 1
    return int(order[min(int(torch.searchsorted(sums, uniform * float(sums[-1]), right=True)), last)])


@dataclass(frozen=True)
class LogProbs:
    """Logarithms of probabilities at temperature 1: the chosen token's, and those of the likeliest tokens."""

    chosen: float
    likeliest: tuple[tuple[int, float], ...]

    @staticmethod
    def of(logits_V: Tensor, token: int, count: int) -> "LogProbs":
        logs_V = logits_V.double().log_softmax(-1)
        best = logs_V.topk(min(count, len(logs_V)))
        return LogProbs(float(logs_V[token]), tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True)))
