"""How far a run is, kept in its status.json for whoever watches from outside."""

import time

from llmtrain.runs.folder import RunFolder
from llmtrain.values.row import Row

SECONDS_BETWEEN_WRITES = 1.0


class ProgressTracker:
    """Writes the step of each row into the run folder's status, at most once a second. The worker writes the end.

    It is the first of a run's trackers: where the folder is another process's by now, none of them writes any more.
    """

    def __init__(self, folder: RunFolder, total_steps: int) -> None:
        self._folder = folder
        self._total_steps = total_steps
        self._written_at = -SECONDS_BETWEEN_WRITES

    def log(self, row: Row) -> None:
        """Raises RunFolderInUseError where the run folder was lost, as `flush` and `close` do."""
        self._folder.ensure_held()
        if time.monotonic() - self._written_at >= SECONDS_BETWEEN_WRITES:
            self._folder.write_status("running", row["step"], self._total_steps, "training")
            self._written_at = time.monotonic()

    def flush(self) -> None:
        """What is written is there."""
        self._folder.ensure_held()

    def close(self, status: str) -> None:
        """The worker writes the end."""
        self._folder.ensure_held()
