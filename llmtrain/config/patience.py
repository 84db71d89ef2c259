"""Early stopping: how long a run has gone on without a better evaluation. Pure.

The count is a plain value that is saved with the state of a run, so that an interrupted run stops where one that was
not interrupted does.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llmtrain.config.metrics import METRIC_TABLE, MetricName
from llmtrain.config.schema import EvaluateConfig


@dataclass(frozen=True)
class Patience:
    """The value of the metric to improve on (None: none was measured yet), its step, and the evaluations since.

    `measured_on` is a hash of what was measured, and on what.
    """

    value: float | None = None
    step: int = 0
    evaluations: int = 0
    measured_on: str | None = None


@dataclass(frozen=True)
class EarlyStop:
    """Ends a run after `stop_after` evaluations in a row without an improvement by more than `min_improvement`.

    Each value is compared with the last one that counted, so that small improvements add up (Prechelt 1998, "Early
    Stopping - But When?").
    """

    stop_after: int
    min_improvement: float
    measured_on: str | None
    metric: MetricName = "loss"

    @staticmethod
    def of(settings: EvaluateConfig, measured_on: str | None) -> "EarlyStop | None":
        """None where the configuration asks for none."""
        if settings.stop_after is None:
            return None
        return EarlyStop(settings.stop_after, settings.min_improvement, measured_on, settings.metric)

    def after(self, patience: Patience, step: int, value: float) -> Patience:
        """The count with one more evaluation. A value that is not finite is no improvement; values of another metric or
        on other validation data do not count."""
        if patience.measured_on != self.measured_on:
            patience = Patience(measured_on=self.measured_on)
        sign = -1 if METRIC_TABLE[self.metric].rises else 1
        limit = math.inf if patience.value is None else sign * patience.value - self.min_improvement
        if math.isfinite(value) and sign * value < limit:
            return Patience(value, step, 0, self.measured_on)
        return Patience(patience.value, patience.step, patience.evaluations + 1, self.measured_on)

    def is_over(self, patience: Patience) -> bool:
        """True where the run has gone on for long enough; a larger `stop_after` may take that back."""
        return patience.measured_on == self.measured_on and patience.evaluations >= self.stop_after


def patience_of(train_state: Mapping[str, Any]) -> Patience:
    """The count in a checkpoint's training state; older ones have none, or name its value for the loss."""
    stored = dict(train_state.get("patience", {}))
    value = stored.pop("loss", None)
    return Patience(**{"value": value, **stored})
