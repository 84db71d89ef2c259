"""The position of a run: the one small value that, with weights and moments, is all that a resume needs."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class TrainState:
    """Counts since the run began. `step` counts batches consumed, skipped updates included."""

    step: int = 0
    samples: int = 0
    tokens: int = 0

    def advanced(self, samples: int, tokens: int) -> "TrainState":
        """The state after one more step that consumed so many samples and tokens."""
        return TrainState(self.step + 1, self.samples + samples, self.tokens + tokens)

    def to_json(self) -> dict[str, int]:
        return asdict(self)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> "TrainState":
        return TrainState(**data)
