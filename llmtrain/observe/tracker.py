"""The seam to whatever records metrics."""

from collections.abc import Mapping
from typing import Any, Protocol

Row = Mapping[str, Any]
"""Metrics of one step by name. `step` is always there; training rows carry `loss`, evaluation rows `valid_loss`."""

RESUMED_FROM = "resumed_from"
"""In a row: the step that the run went back to. The row replaces all earlier ones after that step."""


class Tracker(Protocol):
    """Records rows of metrics somewhere. Failing to record must never stop training."""

    def log(self, row: Row) -> None:
        """Record one row."""
        ...

    def flush(self) -> None:
        """Return once everything logged so far is where a reader finds it."""
        ...

    def close(self, status: str) -> None:
        """Finish; `status` is done, preempted or failed."""
        ...
