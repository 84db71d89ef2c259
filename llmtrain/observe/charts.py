"""The numbers of a row under the names that charts show, and TensorBoard's charts.

Weights & Biases and TensorBoard group charts by the first part of their names; metrics.jsonl has the names on the left.
"""

from pathlib import Path

from llmtrain.values.progress import RESUMED_FROM, TASK_SECONDS, Row

CHART_NAMES = {
    "loss": "train/loss",
    "grad_norm": "train/grad_norm",
    "lr": "train/lr",
    "tokens": "train/tokens",
    "skipped": "train/skipped_steps",
    "loss_scale": "train/loss_scale",
    TASK_SECONDS: "task/seconds",
    "attempt": "train/attempt",
    "tokens_per_second": "perf/tokens_per_second",
    "mfu": "perf/mfu",
    "step_seconds": "perf/step_seconds",
    "data_seconds": "perf/data_seconds",
    "checkpoint_seconds": "perf/checkpoint_seconds",
    "memory_bytes": "memory/peak_bytes",
    "resident_bytes": "memory/resident_bytes",
    "device_allocated_bytes": "memory/device_allocated_bytes",
    "device_reserved_bytes": "memory/device_reserved_bytes",
}

CHART_GROUPS = {"valid_": "valid/", "system_": "system/"}
"""Groups of the charts of columns that begin so."""

NO_METRICS = ("step", "time", RESUMED_FROM)
"""Columns that say where a row belongs."""


def scalars(row: Row) -> dict[str, float]:
    """Every number of a row by its chart's name; other values are left out."""
    return {
        chart_name(key): float(value)
        for key, value in row.items()
        if key not in NO_METRICS and isinstance(value, int | float)
    }


def chart_name(key: str) -> str:
    """The chart of a column. An unknown one keeps the group in its name, or joins those of training."""
    if key in CHART_NAMES:
        return CHART_NAMES[key]
    for start, group in CHART_GROUPS.items():
        if key.startswith(start):
            return group + key.removeprefix(start)
    return key if "/" in key else f"train/{key}"


class TensorBoardTracker:
    """Writes every number of a row as a scalar. What lies after `resume_step` from an earlier attempt is hidden."""

    def __init__(self, log_dir: Path, resume_step: int = 0) -> None:
        # Here, so that Weights & Biases has its charts' names where TensorBoard cannot be imported.
        from torch.utils.tensorboard.writer import SummaryWriter

        self._writer = SummaryWriter(str(log_dir), purge_step=resume_step + 1)

    def log(self, row: Row) -> None:
        for name, value in scalars(row).items():
            self._writer.add_scalar(name, value, global_step=row["step"])

    def flush(self) -> None:
        self._writer.flush()

    def close(self, status: str) -> None:
        self._writer.close()
