"""Which trackers a configuration asks for."""

from pathlib import Path

from llmtrain.config.schema import RunConfig
from llmtrain.observe.background import BackgroundTracker
from llmtrain.observe.console import ConsoleTracker
from llmtrain.observe.jsonl import JsonlTracker
from llmtrain.observe.tracker import Tracker

METRICS_FILE = "metrics.jsonl"


def build_trackers(config: RunConfig, run_dir: Path, resume_step: int, console: ConsoleTracker) -> list[Tracker]:
    """metrics.jsonl always, TensorBoard and Weights & Biases as configured; the last two start in threads.

    `resume_step` is the step that this attempt continues after. `console` hears of what goes wrong. Only the rank that
    records calls this. Raises OSError where metrics.jsonl cannot be opened.
    """
    trackers: list[Tracker] = [JsonlTracker(run_dir / METRICS_FILE, resume_step)]
    if config.observe.tensorboard:

        def build_tensorboard() -> Tracker:
            from llmtrain.observe.tensorboard_tracker import TensorBoardTracker  # slow to import

            return TensorBoardTracker(run_dir / "tensorboard", resume_step)

        trackers.append(BackgroundTracker("TensorBoard", build_tensorboard, console.say))
    mode = config.observe.wandb
    if mode != "off":

        def build_wandb() -> Tracker:
            from llmtrain.observe.wandb_tracker import WandbRun, WandbTracker  # slow to import

            run = WandbRun(config.name, config.observe.wandb_project, mode, resume_step)
            return WandbTracker(run, run_dir, config.model_dump(mode="json"))

        trackers.append(BackgroundTracker("Weights & Biases", build_wandb, console.say))
    return trackers
