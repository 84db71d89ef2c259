"""Which trackers a configuration asks for."""

from collections.abc import Callable
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from llmtrain.config.parameters import num_parameters
from llmtrain.config.reading.key_names import redacted
from llmtrain.config.schema import RunConfig
from llmtrain.observe.background import BackgroundTracker
from llmtrain.observe.console import ConsoleTracker
from llmtrain.observe.tracker import Tracker
from llmtrain.parallel.layout import Layout
from llmtrain.runs.attempts import StartedAttempt
from llmtrain.runs.metrics_file import METRICS_FILE, JsonlTracker
from llmtrain.runs.newest_rows import NewestRows, newest_rows

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
    trackers: list[Tracker] = [JsonlTracker(run_dir / METRICS_FILE, attempt.step)]
    if config.observe.tensorboard:

        def build_tensorboard() -> Tracker:
            from llmtrain.observe.tensorboard_tracker import TensorBoardTracker  # slow to import

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
            before = newest_rows(run_dir / METRICS_FILE, 1, attempt.step) if attempt.step else NewestRows()
            for row in (*before.training, before.evaluation):
                tracker.summarize(row or {})
            return tracker

        seconds = ARTIFACT_SECONDS if wants_checkpoint else None
        trackers.append(BackgroundTracker("Weights & Biases", build_wandb, console.say, seconds))
    return trackers


def describe_run(config: RunConfig, layout: Layout, attempt: StartedAttempt) -> dict[str, Any]:
    """What the configuration does not say of an attempt."""
    return {
        "llmtrain_version": metadata.version("llmtrain"),
        "torch_version": metadata.version("torch"),
        "parameters": num_parameters(config.model),
        "world_size": config.launch.num_workers,
        "layout": asdict(layout),
        "attempt": attempt.number,
        "resumed_from_step": attempt.step,
    }
