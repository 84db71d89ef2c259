"""The words at the end of a run: why it has ended, what is left of it to do, and which checkpoint is its best."""

from pathlib import Path

from llmtrain.checkpoint.folders import step_folder_name
from llmtrain.config.budget import Seen
from llmtrain.config.metrics import METRIC_TABLE, MetricName, titled
from llmtrain.config.patience import EarlyStop, Patience
from llmtrain.config.schema import RunConfig
from llmtrain.words import counted


def nothing_left(config: RunConfig, seen: Seen) -> str:
    """The text of a run that has nothing left to do, with the key that would change that."""
    steps, tokens, epochs = config.train.steps, config.train.tokens, config.train.epochs
    if epochs is not None:
        done = f"{seen.data_tokens} tokens in {seen.step} steps, and train.epochs = {epochs} are {tokens}"
        return f"already done, {done}. Raise train.epochs to go on."
    if tokens is not None:
        done = f"{seen.data_tokens} tokens in {seen.step} steps, and train.tokens asks for {tokens}"
        return f"already done, {done}. Raise train.tokens above {seen.data_tokens} to go on."
    done = f"all {seen.step} steps" if seen.step == steps else f"{seen.step} steps, and train.steps asks for {steps}"
    return f"already done, {done}. Raise train.steps above {seen.step} to go on."


def early_stop_text(stop: EarlyStop, patience: Patience, step: int) -> str:
    """Why a run has ended before its last step."""
    number = counted(patience.evaluations, "evaluation")
    name, than = titled(stop.metric).lower(), "above" if METRIC_TABLE[stop.metric].rises else "below"
    if patience.value is None:
        return f"stopped early at step {step:,}: none of {number} gave a finite {name}"
    more = f" by more than {stop.min_improvement:g}" if stop.min_improvement else ""
    return (
        f"stopped early at step {step:,}: {number} in a row without a validation {name} {than} the "
        f"{patience.value:.6g} of step {patience.step:,}{more} (evaluate.stop_after = {stop.stop_after})"
    )


def best_text(checkpoints: Path, best: tuple[int, float] | None, metric: MetricName) -> str:
    """Which checkpoint is the best, and by what; empty where none was measured."""
    if best is None:
        return ""
    step, value = best
    return f"best checkpoint: {checkpoints / step_folder_name(step)}, validation {titled(metric).lower()} {value:.6g}"
