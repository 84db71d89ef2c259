"""A run whose steps change nothing has not trained, however many there are: when it is given up, and in which words."""

from dataclasses import dataclass

from llmtrain.config.schema import RunConfig
from llmtrain.errors import NoProgressError
from llmtrain.train.state import TrainState

SKIPPED_AT_END = 3
"""A run that ends on so many skipped steps in a row has not succeeded. One or two may be a batch, or a trial of fp16's
loss scale."""


@dataclass(frozen=True)
class StallLimit:
    """How many skipped steps in a row a run may have. They are counted over resumes: where a run was interrupted does
    not matter. All ranks see the same steps skipped, and so end alike."""

    max_skipped_steps: int
    precision: str

    @staticmethod
    def of(config: RunConfig) -> "StallLimit":
        return StallLimit(config.health.max_skipped_steps, config.train.precision)

    def require_progress(self, state: TrainState) -> None:
        """Raise NoProgressError where a run that still has steps to make has only skipped ones for too long."""
        if self.max_skipped_steps and state.skipped_in_row >= self.max_skipped_steps:
            limit = f"health.max_skipped_steps = {self.max_skipped_steps}"
            raise NoProgressError(f"{skipped_text(state)} ({limit}). {self._advice(state)}")

    def require_result(self, state: TrainState) -> None:
        """Raise NoProgressError where a run that has made its last step has nothing to show for it."""
        skipped = state.skipped_in_row
        if skipped and (skipped == state.step or skipped >= SKIPPED_AT_END):
            more = f"More than {state.step:,} steps (train.steps or train.tokens) go on from here"
            raise NoProgressError(f"{skipped_text(state)}. {self._advice(state)} {more}.")

    def _advice(self, state: TrainState) -> str:
        """What may be mended; what is known of each step stands in the audit log."""
        scale = ", a lower optim.loss_scale.initial, or train.precision=bf16" if self.precision == "fp16" else ""
        back = "begin anew under another name"
        if state.skipped_in_row < state.step:
            back += ", or continue an older checkpoint (checkpoint.resume=PATH)"
        return (
            f"audit.jsonl names their samples (skipped_step). Try a lower optim.lr{scale}; look at those samples with "
            f"`llmtrain data show`. Where the weights are bad already, {back}."
        )


def skipped_text(state: TrainState) -> str:
    """How much of a run's end was skipped, and which step's weights it therefore has; empty where none was."""
    step, skipped = state.step, state.skipped_in_row
    if not skipped:
        return ""
    if skipped == step:
        return (
            f"no progress: each of the run's {step:,} steps was skipped, as no gradient was finite; the weights are "
            "those that it began with"
        )
    last = f"the last {skipped:,} steps were" if skipped > 1 else "the last step was"
    return f"no progress since step {step - skipped:,}: {last} skipped, as no gradient was finite"
