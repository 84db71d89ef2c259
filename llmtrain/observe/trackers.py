"""The seam to whatever records metrics, and the trackers that a configuration asks for."""

import threading
from collections.abc import Callable
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol

from llmtrain.config.parameters import num_parameters
from llmtrain.config.reading.rendering import redacted
from llmtrain.config.schema import RunConfig
from llmtrain.observe.console import ConsoleTracker
from llmtrain.parallel.layout import Layout
from llmtrain.runs.audit import StartedAttempt
from llmtrain.runs.metrics_file import METRICS_FILE, JsonlTracker, NewestRows, newest_rows
from llmtrain.values.progress import Row


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


GATHER_SECONDS = 0.5
"""Rows are handed on in batches: waking the thread for each row would cost training more than the row itself."""

FLUSH_SECONDS = 1.0
CLOSE_SECONDS = 30.0


class BackgroundTracker:
    """Builds a tracker in a thread and hands it each row there.

    Whatever goes wrong in it is said once through `warn`; the rows after that are dropped. `flush` waits at most
    FLUSH_SECONDS and `close` at most `close_seconds` (CLOSE_SECONDS): training is worth more than a chart.
    """

    def __init__(
        self,
        label: str,
        build: Callable[[], Tracker],
        warn: Callable[[str], None],
        close_seconds: float | None = None,
    ) -> None:
        self._label = label
        self._build = build
        self._warn = warn
        self._close_seconds = close_seconds
        self._jobs: SimpleQueue[Callable[[Tracker], None] | None] = SimpleQueue()
        self._wake = threading.Event()
        self._failed = False
        self._thread = threading.Thread(target=self._work, name=f"tracker {label}", daemon=True)
        self._thread.start()

    def log(self, row: Row) -> None:
        if not self._failed:
            self._jobs.put(lambda tracker: tracker.log(row))

    def flush(self) -> None:
        drained = threading.Event()

        def drain(tracker: Tracker) -> None:
            tracker.flush()
            drained.set()

        if not self._failed:
            self._jobs.put(drain)
            self._wake.set()
            drained.wait(FLUSH_SECONDS)

    def close(self, status: str) -> None:
        self._jobs.put(lambda tracker: tracker.close(status))
        self._jobs.put(None)
        self._wake.set()
        seconds = self._close_seconds or CLOSE_SECONDS
        self._thread.join(seconds)
        if self._thread.is_alive():
            self._warn(f"{self._label} did not finish within {seconds:.0f} s; its last rows may be missing there")

    def _work(self) -> None:
        try:
            tracker = self._build()
            while (job := self._next_job()) is not None:
                job(tracker)
        except Exception as error:
            self._failed = True
            reason = str(error) or type(error).__name__
            self._warn(f"{self._label} is off from here on ({reason}); metrics.jsonl has everything")

    def _next_job(self) -> Callable[[Tracker], None] | None:
        if self._jobs.empty():
            self._wake.wait(GATHER_SECONDS)
            self._wake.clear()
        return self._jobs.get()


ARTIFACT_SECONDS = 300.0
"""How long the end of a run waits for its last checkpoint to be hashed and sent."""


def build_trackers(
    config: RunConfig,
    layout: Layout,
    run_dir: Path,
    attempt: StartedAttempt,
    console: ConsoleTracker,
    final_checkpoint: Callable[[], Path | None] = lambda: None,
) -> list[Tracker]:
    """metrics.jsonl always, TensorBoard and Weights & Biases as configured; the last two start in threads.

    `console` hears of what goes wrong. `final_checkpoint` is asked at the end where observe.wandb_artifacts wants it.
    Only the rank that records calls this. Raises OSError where metrics.jsonl cannot be opened.
    """
    # The file comes first: charts may fail, and what a resume needs is written before them.
    trackers: list[Tracker] = [JsonlTracker(run_dir / METRICS_FILE, attempt.step)]
    if config.observe.tensorboard:

        def build_tensorboard() -> Tracker:
            from llmtrain.observe.charts import TensorBoardTracker  # slow to import

            return TensorBoardTracker(run_dir / "tensorboard", attempt.step)

        trackers.append(BackgroundTracker("TensorBoard", build_tensorboard, console.say))
    mode = config.observe.wandb
    if mode != "off":
        wants_checkpoint = config.observe.wandb_artifacts == "final"

        def build_wandb() -> Tracker:
            from llmtrain.observe.wandb_tracker import WandbRun, WandbTracker  # slow to import

            run = WandbRun(
                config.name, config.observe.wandb_project, mode, attempt.number, attempt.step, attempt.run_id
            )
            shown = {**redacted(config.model_dump(mode="json")), "run": describe_run(config, layout, attempt)}
            tracker = WandbTracker(run, run_dir, shown, console.say, final_checkpoint if wants_checkpoint else None)
            before = NewestRows()
            if attempt.step:
                before = newest_rows(run_dir / METRICS_FILE, 1, attempt.step, tasks=bool(config.evaluate.tasks))
            for row in (*before.training, before.evaluation, before.tasks):
                tracker.summarize(row or {})
            return tracker

        seconds = ARTIFACT_SECONDS if wants_checkpoint else None
        trackers.append(BackgroundTracker("Weights & Biases", build_wandb, console.say, seconds))
    return trackers


def describe_run(config: RunConfig, layout: Layout, attempt: StartedAttempt) -> dict[str, Any]:
    """Facts about an attempt beside its configuration."""
    return {
        "llmtrain_version": metadata.version("llmtrain"),
        "torch_version": metadata.version("torch"),
        "parameters": num_parameters(config.model),
        "world_size": config.launch.num_workers,
        "layout": asdict(layout),
        "attempt": attempt.number,
        "resumed_from_step": attempt.step,
    }
