"""What a step has come to: from whatever runs it to whoever judges and records it."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did. On rank 0 `loss` is that of the whole step.

    `loss` is the main objective only: summed over the step's valid target tokens and divided by their number.
    `grad_norm` is the global norm before clipping. `skipped` says that a gradient was not finite and that neither
    weights nor moments changed.
    """

    loss: float
    grad_norm: float
    num_tokens: int
    skipped: bool = False
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class EvalResult:
    """Sum of the loss over valid target tokens, and their number, over all ranks."""

    loss_sum: float
    num_tokens: int
