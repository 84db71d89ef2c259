"""Evaluation during training: the loss over the same first samples every time."""

from dataclasses import dataclass
from itertools import islice

from llmtrain.data.loader import BatchLoader
from llmtrain.engines.base import Engine


@dataclass(frozen=True)
class Evaluation:
    """Every `every_steps` steps (0: never), the mean loss over `num_batches` global batches, weighted by tokens.

    Data that has fewer is read once: its loader is one of a stream that is, so that no token counts twice.
    With `before_saves` also at every step that is saved in any case: the best checkpoint is known by its loss.
    """

    loader: BatchLoader | None
    every_steps: int
    num_batches: int
    before_saves: bool = False

    def due(self, step: int, saved: bool) -> bool:
        """Whether a step is evaluated; `saved` says that it is saved whether or not the run is told to stop.

        A save because of a signal is not evaluated: there is no time, and a run that nobody stops would not have it.
        """
        if self.loader is None:
            return False
        return (self.every_steps > 0 and step % self.every_steps == 0) or (saved and self.before_saves)

    def run(self, engine: Engine) -> tuple[float, int]:
        """(mean loss, number of target tokens)."""
        assert self.loader is not None
        steps = self.loader.steps(first_sample=0)
        num_batches = min(self.num_batches, self.loader.steps_once)
        results = [engine.eval_step(micro_batches) for micro_batches in islice(steps, num_batches)]
        num_tokens = sum(result.num_tokens for result in results)
        return sum(result.loss_sum for result in results) / max(1, num_tokens), num_tokens
