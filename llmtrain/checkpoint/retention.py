"""Which checkpoints of a run stay, and how many lie side by side. Pure arithmetic."""

import math
from collections.abc import Mapping

from llmtrain.config.schema import CheckpointConfig


def steps_to_remove(metrics: Mapping[int, float | None], settings: CheckpointConfig) -> list[int]:
    """Which checkpoints to delete, oldest first.

    Kept are the newest `keep`, every multiple of `keep_every_steps`, and with `keep_best` the one with the lowest
    metric (of equal ones the oldest). `metrics` holds all that exist, None where a checkpoint has no metric.
    """
    kept = set(sorted(metrics)[-settings.keep :])
    if settings.keep_every_steps:
        kept |= {step for step in metrics if step % settings.keep_every_steps == 0}
    measured = [(metric, step) for step, metric in metrics.items() if metric is not None]
    if settings.keep_best and measured:
        kept.add(min(measured)[1])
    return sorted(metrics.keys() - kept)


def most_at_once(settings: CheckpointConfig, total_steps: int) -> int:
    """How many checkpoints lie side by side at most, the one being written included."""
    every = settings.every_steps or total_steps
    kept = settings.keep + settings.keep_best
    if settings.keep_every_steps:
        kept += total_steps // math.lcm(every, settings.keep_every_steps)
    return min(math.ceil(total_steps / every), kept + 1)
