"""The story of a run."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from llmtrain.config.schema import OptimConfig
from llmtrain.data.loader import BatchLoader
from llmtrain.engines.base import Engine
from llmtrain.observe.monitor import Monitor
from llmtrain.optim.schedule import learning_rate
from llmtrain.train.evaluate import Evaluation
from llmtrain.train.saving import Saving
from llmtrain.train.state import TrainState


@dataclass(frozen=True)
class Run:
    """What a run needs, built by train/setup.py. `state` is where it begins or continues."""

    loader: BatchLoader
    engine: Engine
    monitor: Monitor
    evaluation: Evaluation
    saving: Saving
    state: TrainState
    total_steps: int
    optim: OptimConfig


def train(run: Run, stop_requested: Callable[[], bool]) -> tuple[Literal["done", "preempted"], TrainState]:
    """Train to the last step, or until `stop_requested`, which is asked once per step. Either way the end is saved."""
    state, monitor, stopping = run.state, run.monitor, False
    steps = run.loader.steps(first_sample=state.samples)
    try:
        while state.step < run.total_steps and not stopping:
            with monitor.section("data"):
                micro_batches = next(steps)

            step = state.step + 1
            lr = learning_rate(step, run.optim, run.total_steps)
            result = run.engine.train_step(step, micro_batches, lr)
            state = state.advanced(run.loader.global_batch_size, result.num_tokens)
            monitor.step(step, lr, result)

            valid_loss = None
            if run.evaluation.due(step):
                with monitor.section("evaluate"):
                    valid_loss, num_tokens = run.evaluation.run(run.engine)
                monitor.evaluated(step, valid_loss, num_tokens)

            stopping = stop_requested()
            if run.saving.due(step) or stopping:
                with monitor.section("checkpoint"):
                    run.saving.save(state, run.engine, valid_loss)
    finally:
        steps.close()
    run.saving.finish()
    return ("done" if state.step == run.total_steps else "preempted"), state
