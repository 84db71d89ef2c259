"""Schedules over the steps of a run: the learning rate, and the loss scale of fp16. Pure arithmetic."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from llmtrain.config.schema import LossScaleConfig, OptimConfig


def cosine(progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress))


def linear(progress: float) -> float:
    return 1 - progress


DECAYS: dict[str, Callable[[float], float]] = {"cosine": cosine, "linear": linear, "wsd": linear}


def learning_rate(step: float, optim: OptimConfig, total_steps: int) -> float:
    """Rate of step `step`, counted from 1: linear warm-up to `lr`, then the schedule down to `min_lr`.

    Where the schedule goes by tokens, `step` may lie between two steps of the size that it counts in.
    """
    if step <= optim.warmup_steps:
        return optim.lr * step / optim.warmup_steps
    if optim.schedule == "constant":
        return optim.lr
    if optim.schedule == "inverse_sqrt":
        return max(optim.min_lr, optim.lr * math.sqrt(max(1, optim.warmup_steps) / step))
    first, last = decay_window(optim, total_steps)
    progress = min(1.0, max(0.0, (step - first) / max(1, last - first)))
    return optim.min_lr + (optim.lr - optim.min_lr) * DECAYS[optim.schedule](progress)


def decay_window(optim: OptimConfig, total_steps: int) -> tuple[int, int]:
    """The steps between which the rate falls: lr at the first, min_lr at the last."""
    if optim.schedule == "wsd":
        length = optim.decay_steps or max(1, total_steps // 10)
        return max(optim.warmup_steps, total_steps - length), total_steps
    return optim.warmup_steps, optim.decay_steps or total_steps


class LossScale:
    """Halves at a step whose gradient is not finite, doubles after a run of good ones (Micikevicius et al. 2018)."""

    def __init__(self, config: LossScaleConfig) -> None:
        self.config = config
        self.scale = config.initial
        self.good_steps = 0

    def update(self, finite: bool) -> None:
        """Take note of a step: `finite` says whether all of its gradients were."""
        if not finite:
            self.scale = max(self.config.minimum, self.scale / 2)
            self.good_steps = 0
            return
        self.good_steps += 1
        if self.good_steps == self.config.growth_interval:
            self.scale *= 2
            self.good_steps = 0

    def state(self) -> dict[str, float]:
        return {"scale": self.scale, "good_steps": self.good_steps}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.scale, self.good_steps = float(state["scale"]), int(state["good_steps"])
