"""The one policy for the loss scale of fp16, the same in every engine. Pure arithmetic."""

from collections.abc import Mapping
from typing import Any

from llmtrain.config.schema import LossScaleConfig, OptimConfig


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


def build_loss_scale(precision: str, optim: OptimConfig) -> LossScale | None:
    """A loss scale where the precision needs one: fp16's gradients underflow, those of bf16 and fp32 do not."""
    return LossScale(optim.loss_scale) if precision == "fp16" else None
