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


DISTILL_LOSS = "distill_loss"
"""The divergence from a teacher per target, in nats at its temperature: a metric of steps and, with `valid_` before it,
of evaluations."""


SPARSITY = "sparsity"
"""The share of the weights that `prune.targets` name that has been pruned by the schedule: a metric of steps."""


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
    """Sum of the loss over valid target tokens, and their number, over all ranks. `counts` add up too: of a head for
    labels those that `values/label_metrics.py` makes metrics of, with a teacher the sum of the divergence from it.
    Where batches tell texts apart, `counts` are the sums of the loss of each text, and behind them how many of its
    tokens were not the likeliest."""

    loss_sum: float
    num_tokens: int
    counts: tuple[float, ...] = ()


Row = Mapping[str, Any]
"""Metrics of one step by name. `step` is always there; training rows carry `loss`, evaluation rows `valid_loss`, and
those of tasks `task_seconds`."""

RESUMED_FROM = "resumed_from"
"""In a row: the step that the run went back to. The row replaces all earlier ones after that step."""


SOURCE_TOKENS = "source_tokens/"
"""Begins the columns with the tokens of data of each source so far, padding included."""


TASK = "task/"
"""Begins the columns with the metrics of tasks: `task/`, the task, `/` and the metric."""

TASK_SECONDS = "task_seconds"
"""What an evaluation on tasks took: a row that has it has nothing but tasks."""


def task_title(column: str) -> str:
    """The column of a task's metric as pages show it: capitals: accuracy per byte."""
    _, task, metric = column.split("/")
    return f"{task}: {metric.replace('_', ' ')}"


RowKind = Literal["training", "evaluation", "tasks"]
ROW_KINDS: tuple[RowKind, ...] = get_args(RowKind)
"""In the order in which the rows of a step are recorded."""


def row_kind(row: Row) -> RowKind:
    """The kind of a row of metrics."""
    return "evaluation" if "valid_loss" in row else "tasks" if TASK_SECONDS in row else "training"


Phase = Literal["setup", "data", "step", "evaluate", "checkpoint"]
PHASES: tuple[Phase, ...] = get_args(Phase)
"""The phases of a run's time. Its first step belongs to the setup: compilers and allocators work in it."""
