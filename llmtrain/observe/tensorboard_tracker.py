"""Rows as TensorBoard event files."""

from pathlib import Path

from torch.utils.tensorboard.writer import SummaryWriter

from llmtrain.observe.scalars import scalars
from llmtrain.values.row import Row


class TensorBoardTracker:
    """Writes every number of a row as a scalar. What lies after `resume_step` from an earlier attempt is hidden."""

    def __init__(self, log_dir: Path, resume_step: int = 0) -> None:
        self._writer = SummaryWriter(str(log_dir), purge_step=resume_step + 1)

    def log(self, row: Row) -> None:
        for name, value in scalars(row).items():
            self._writer.add_scalar(name, value, global_step=row["step"])

    def flush(self) -> None:
        self._writer.flush()

    def close(self, status: str) -> None:
        self._writer.close()
