"""The position of a run: the one small value that, with weights and moments, is all that a resume needs."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from llmtrain.train.health import LossHistory


@dataclass(frozen=True)
class TrainState:
    """Counts since the run began. `step` counts batches consumed, skipped updates included.

    `samples` is the position in the stream of samples, those passed over included. `history` is what the next loss is
    judged by; it is empty where nothing depends on it.
    """

    step: int = 0
    samples: int = 0
    tokens: int = 0
    history: LossHistory = field(default_factory=LossHistory)

    def advanced(self, samples: int, tokens: int, history: LossHistory | None = None) -> "TrainState":
        """The state after one more step that moved on by so many samples and tokens."""
        return TrainState(self.step + 1, self.samples + samples, self.tokens + tokens, history or self.history)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> "TrainState":
        """The state of a checkpoint; older ones have no history."""
        history = data.get("history", {})
        losses, strikes = tuple(history.get("losses", ())), history.get("strikes", 0)
        return TrainState(data["step"], data["samples"], data["tokens"], LossHistory(losses, strikes))
