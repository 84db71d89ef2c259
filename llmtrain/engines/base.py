"""The seam between the loop and whatever runs a training step."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from llmtrain.values.batch import Batch
from llmtrain.values.fragment import Fragment, FragmentSource
from llmtrain.values.progress import EvalResult, StepResult


@dataclass(frozen=True)
class Scales:
    """The factors of a micro-batch's gradients: for the loss of each target, and for balancing losses."""

    loss: float
    balance: float = 0.0


GradientInspector = Callable[[Iterable[Fragment]], None]


class Engine(Protocol):
    """Runs whole optimizer steps. The unit is a step because pipeline schedules pull micro-batches themselves."""

    inspect_gradients: GradientInspector | None
    """Called, where set, with this rank's part of a step's gradients, unscaled and not clipped, before the update."""

    def train_step(self, step: int, micro_batches: Sequence[Batch], lr: float) -> StepResult:
        """Forward, backward and update for this rank's micro-batches of step `step` (from 1)."""
        ...

    def eval_step(self, micro_batches: Sequence[Batch]) -> EvalResult:
        """Loss without update and without dropout."""
        ...

    def fragments(self) -> Iterator[Fragment]:
        """This rank's part of weights and moments, each element of the run on exactly one rank.

        The tensors are the live ones: copy them before the next step.
        """
        ...

    def load(self, source: FragmentSource) -> None:
        """Replace weights and moments by what `source` holds. Raises CheckpointError where it does not fit."""
        ...

    def load_weights(self, source: FragmentSource) -> None:
        """Replace the weights only, as at the start of a run from imported weights."""
        ...

    def state(self) -> dict[str, Any]:
        """The rest that must be restored, as JSON: loss scale, good steps, the optimizer's update count."""
        ...

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned."""
        ...
