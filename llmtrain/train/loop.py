"""The story of a run."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Literal

from llmtrain.config.budget import Budget
from llmtrain.config.patience import EarlyStop
from llmtrain.config.schema import RunConfig
from llmtrain.data.loader import BatchLoader
from llmtrain.engines.base import Engine
from llmtrain.observe.monitor import Monitor
from llmtrain.optim.schedule import learning_rate
from llmtrain.train.health import Health, StallLimit
from llmtrain.train.recording import evaluation_metrics
from llmtrain.train.rollback import Rollbacks
from llmtrain.train.state import Saving, TrainState
from llmtrain.train.tasks import TaskEvaluation
from llmtrain.values.progress import Reading


@dataclass(frozen=True)
class Evaluation:
    """Every `every_steps` steps (0: never), the mean loss over `num_batches` global batches, weighted by tokens.

    Data that has fewer is read once: its loader is one of a stream that is, so that no token counts twice.
    With `before_saves` also at every step that is saved in any case: the best checkpoint is known by what it measures.
    """

    loader: BatchLoader | None
    every_steps: int
    num_batches: int
    before_saves: bool = False
    early_stop: EarlyStop | None = None

    def due(self, step: int, saved: bool) -> bool:
        """True for a step to evaluate; `saved`: it is saved whether or not the run is told to stop.

        A save because of a signal is not evaluated: there is no time, and a run that nobody stops would not have it.
        """
        if self.loader is None:
            return False
        return self._is_regular(step) or (saved and self.before_saves)

    def _is_regular(self, step: int) -> bool:
        return self.every_steps > 0 and step % self.every_steps == 0

    def run(self, engine: Engine) -> tuple[float, int, Sequence[float]]:
        """(mean loss, number of targets, what further metrics are made of)."""
        assert self.loader is not None
        steps = self.loader.steps(first_sample=0)
        num_batches = min(self.num_batches, self.loader.steps_once)
        results = [engine.eval_step(micro_batches) for micro_batches in islice(steps, num_batches)]
        num_tokens = sum(result.num_tokens for result in results)
        counts = [sum(found) for found in zip(*(result.counts for result in results), strict=True)]
        return sum(result.loss_sum for result in results) / max(1, num_tokens), num_tokens, counts

    def judge(self, state: TrainState, value: float, anybody: Callable[[bool], bool]) -> tuple[TrainState, bool]:
        """The state with an evaluation counted, and whether the run stops early because of it, on all ranks alike.

        Those that only a save has brought about do not count: where saves lie must not decide where a run ends.
        """
        if self.early_stop is None or not self._is_regular(state.step):
            return state, False
        patience = self.early_stop.after(state.patience, state.step, value)
        return replace(state, patience=patience), anybody(self.early_stop.is_over(patience))


@dataclass(frozen=True)
class Run:
    """The parts of a run, built by train/setup.py. `state` is where it begins or continues."""

    loader: BatchLoader
    engine: Engine
    monitor: Monitor
    evaluation: Evaluation
    tasks: TaskEvaluation
    saving: Saving
    health: Health
    rollbacks: Rollbacks
    state: TrainState
    config: RunConfig


def evaluate(run: Run, step: int, saved: bool) -> float | None:
    """Measure what is due at a step. Returns the value of evaluate.metric, None where that is not."""
    value, monitor = None, run.monitor
    if run.evaluation.due(step, saved):
        with monitor.phase("evaluate"):
            valid_loss, num_tokens, counts = run.evaluation.run(run.engine)
        metrics = evaluation_metrics(run.config, valid_loss, num_tokens, counts)
        monitor.evaluated(step, valid_loss, num_tokens, metrics)
        value = {"loss": valid_loss, **metrics}[run.config.evaluate.metric]
    if run.tasks.due(step):
        with monitor.phase("evaluate"):
            measured = run.tasks.run(run.engine)
        monitor.measured(step, measured)
    return value


def train(
    run: Run, stop_requested: Callable[[], bool], anybody: Callable[[bool], bool] = bool
) -> tuple[Literal["done", "preempted"], TrainState]:
    """Train to the last step, an early stop, or until `stop_requested`, asked once per step. The end is saved.

    `anybody` tells whether a flag is set on any rank. Raises NoProgressError where all that was done changed nothing.
    """
    state, loader, monitor, stopping, early = run.state, run.loader, run.monitor, False, False
    budget = Budget.of(run.config)
    stall_limit = StallLimit(run.config.health.max_skipped_steps, run.config.train.precision)
    steps = loader.steps(state.samples, state.step + 1)
    try:
        while state.step < budget.last_step(state.seen) and not (stopping or early):
            with monitor.phase("data"):
                micro_batches = next(steps)

            step = state.step + 1
            place, length = budget.schedule(state.seen)
            lr = learning_rate(place, run.config.optim, length)
            attempt = partial(run.engine.train_step, step, micro_batches, lr)
            result = attempt()
            if result.skipped:
                result = run.health.retry_skipped(step, result, attempt, loader.step_origins(state.samples, step))
            history, trouble = run.health.judge(state.history, step, result)
            moved, read = loader.step_length(state.samples, step), budget.tokens_of(step)
            state = state.advanced(moved, result.num_tokens, read, history, result.skipped)
            monitor.step(step, lr, result, Reading(read, state.samples, loader.source_tokens))

            # Every rank asks at every step: `anybody` is a collective, and only rank 0 has the loss to judge.
            if run.rollbacks.wanted(trouble, anybody):
                with monitor.phase("checkpoint"):
                    back = run.rollbacks.go_back(trouble, state, run.engine)
                if back:
                    steps.close()  # it has prepared steps of the data that is skipped now
                    state, loader = back.state, loader.skipping([back.skipped])
                    steps = loader.steps(state.samples, state.step + 1)
                    monitor.went_back(state.step, state.tokens)
                    continue
            stall_limit.require_progress(state)

            # Evaluated before it is saved: the manifest of a checkpoint has what the best one is known by.
            saved = run.saving.due(step) or step == budget.last_step(state.seen)
            value = evaluate(run, step, saved)
            if value is not None:
                state, early = run.evaluation.judge(state, value, anybody)

            stopping = stop_requested()  # after the step on every rank: all of them stop behind the same one
            if saved or stopping or early:
                with monitor.phase("checkpoint"):
                    run.saving.save(state, run.engine, value)
    finally:
        steps.close()
    run.saving.finish()  # after a good end only: the error of a run must not hide behind one of its last save
    if state.step < budget.last_step(state.seen) and not early:
        return "preempted", state
    stall_limit.require_result(state)
    return "done", state
