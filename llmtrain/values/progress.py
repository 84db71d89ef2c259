"""News of a run while it goes on: the phase that it is in, the result of a step, a row of metrics. Imports nothing."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args


@dataclass(frozen=True)
class StepResult:
    """The result of one optimizer step. On rank 0 `loss` is that of the whole step.

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
class Reading:
    """The data that a step has read: its tokens, and the position of the stream of samples behind it.

    `source_tokens` tells for a position how many tokens of each source were read up to there.
    """

    tokens: int
    position: int
    source_tokens: Callable[[int], Sequence[int]]


@dataclass(frozen=True)
class EvalResult:
    """Sum of the loss over valid target tokens, and their number, over all ranks; of a head for labels also the
    counts that `values/label_metrics.py` makes metrics of, which add up."""

    loss_sum: float
    num_tokens: int
    counts: tuple[float, ...] = ()


Row = Mapping[str, Any]
"""Metrics of one step by name. `step` is always there; training rows carry `loss`, evaluation rows `valid_loss`."""

RESUMED_FROM = "resumed_from"
"""In a row: the step that the run went back to. The row replaces all earlier ones after that step."""


SOURCE_TOKENS = "source_tokens/"
"""Begins the columns with the tokens of data of each source so far, padding included."""


Phase = Literal["setup", "data", "step", "evaluate", "checkpoint"]
PHASES: tuple[Phase, ...] = get_args(Phase)
"""The phases of a run's time. Its first step belongs to the setup: compilers and allocators work in it."""
