"""The position of a run: the one small value that, with weights and moments, is all that a resume needs."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from llmtrain.config.budget import Seen, seen_by
from llmtrain.train.health import LossHistory


@dataclass(frozen=True)
class TrainState:
    """Counts since the run began. `step` counts batches consumed, skipped updates included.

    `samples` is the position in the stream of samples, those passed over included. `tokens` counts targets;
    `data_tokens` counts what was read to get them, and `first_step_tokens` what the first step read. `history` is what
    the next loss is judged by; it is empty where nothing depends on it. `skipped_in_row` counts the last steps that
    changed nothing, as their gradients were not finite.
    """

    step: int = 0
    samples: int = 0
    tokens: int = 0
    history: LossHistory = field(default_factory=LossHistory)
    data_tokens: int = 0
    first_step_tokens: int = 0
    skipped_in_row: int = 0

    @property
    def seen(self) -> Seen:
        """What the budget and the schedule go by."""
        return Seen(self.step, self.data_tokens, self.first_step_tokens)

    def advanced(
        self, samples: int, tokens: int, data_tokens: int, history: LossHistory | None = None, skipped: bool = False
    ) -> "TrainState":
        """The state after one more step that moved on by so many samples, and read `data_tokens` for its targets."""
        return TrainState(
            self.step + 1,
            self.samples + samples,
            self.tokens + tokens,
            history or self.history,
            self.data_tokens + data_tokens,
            self.first_step_tokens or data_tokens,
            self.skipped_in_row + 1 if skipped else 0,
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(data: Mapping[str, Any], config: Mapping[str, Any]) -> "TrainState":
        """The state of a checkpoint that was saved with `config`; older ones have no history, and count no skipped
        steps."""
        history = data.get("history", {})
        losses, strikes = tuple(history.get("losses", ())), history.get("strikes", 0)
        seen, history = seen_by(data, config), LossHistory(losses, strikes)
        counts = (data["step"], data["samples"], data["tokens"])
        skipped = data.get("skipped_in_row", 0)
        return TrainState(*counts, history, seen.data_tokens, seen.first_step_tokens, skipped)
