"""The seam to whatever records metrics."""

from typing import Protocol

from llmtrain.values.row import Row


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
