"""Some steps of one rank, traced with torch.profiler: a timeline for chrome://tracing or Perfetto, and a table."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from llmtrain.values.progress import Phase

PROFILES = "profile"
"""The folder inside a run folder."""

TABLE_ROWS = 60


class Profiler:
    """Stands between a rank and whoever hears of its phases, and traces whole steps, from their data on.

    `steps` are the first and the last. A run that resumes between them traces the rest; behind them, nothing. What goes
    wrong is told through `say` and stops nothing.
    """

    def __init__(
        self,
        hear: Callable[[Phase, int], None],
        steps: tuple[int, int],
        stem: Path,
        say: Callable[[str], None],
    ) -> None:
        """`stem` begins the names of the files."""
        self._hear = hear
        self._first, self._last = steps
        self._stem = stem
        self._say = say
        self._trace: Any = None
        self._from_step = 0
        self._label: Any = None

    def __call__(self, phase: Phase, step: int) -> None:
        """A phase begins, with `step` steps done."""
        self._hear(phase, step)
        if self._last and step >= self._last:
            self._last = 0  # once: a run that goes back traces nothing again
            self._finish(step)
        elif phase == "data" and self._trace is None and self._first - 1 <= step < self._last:
            self._begin(step + 1)
        if self._trace is not None:
            self._name(phase, step)

    def _begin(self, step: int) -> None:
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it would print its own stages over the progress bar
        try:
            self._trace = profile(activities=activities, record_shapes=True, profile_memory=True)
            self._trace.start()
            self._from_step = step
        except RuntimeError as error:
            self._trace, self._last = None, 0
            self._say(f"observe.profile: {error}. Training goes on without a trace.")

    def _name(self, phase: Phase, step: int) -> None:
        """Let the timeline show where a part of the loop begins."""
        if self._label is not None:
            self._label.__exit__(None, None, None)
        if phase in ("evaluate", "checkpoint"):
            name = f"{phase} after step {step}"
        else:
            name = f"{'data' if phase == 'data' else 'work'} of step {step + 1}"
        self._label = record_function(name)
        self._label.__enter__()

    def _finish(self, step: int) -> None:
        if self._trace is None:
            return
        trace, self._trace = self._trace, None
        try:
            self._label.__exit__(None, None, None)
            trace.stop()
            self._stem.parent.mkdir(parents=True, exist_ok=True)
            steps = f"{self._from_step:08d}-{step:08d}"
            path = self._stem.with_name(f"{self._stem.name}-steps-{steps}.json.gz")
            trace.export_chrome_trace(str(path))
            # The operations that took the most time of their own, on the device where there is one.
            key = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
            table = trace.key_averages().table(sort_by=key, row_limit=TABLE_ROWS) + "\n"
            path.with_name(path.name.removesuffix(".json.gz") + ".txt").write_text(table, "utf-8")
        except Exception as error:  # a trace is worth less than the run, whatever is wrong with it
            self._say(f"observe.profile: the trace cannot be written: {error}. Training goes on.")
            return
        self._say(f"traced steps {self._from_step} to {step}: {path}")
