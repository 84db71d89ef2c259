"""The answer to bad numbers: a step without finite gradients is run once more and named, a loss is judged.

A run whose steps change nothing has not trained, however many there are: it is given up.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from statistics import median
from typing import Any, Literal

from llmtrain.config.schema import HealthConfig
from llmtrain.data.stream import SampleOrigin
from llmtrain.errors import NoProgressError
from llmtrain.train.state import LossHistory, TrainState
from llmtrain.values.progress import StepResult

FEWEST_LOSSES = 20
"""Before there are so many losses to compare with, none is a spike: a run begins with steep ones."""

LEAST_DEVIATION = 0.01
"""The least median absolute deviation, as a share of the median: beside a flat curve every loss would be a spike."""

LONGEST_LIST = 300
"""Characters of samples and shards that a message has room for; the audit log has all."""

Verdict = Literal["transient", "persistent", "loss_scale", "not_rerun"]
"""Causes of a gradient that was not finite. transient: it was finite when the step ran again. persistent: it was not.
loss_scale: the scale was too high, which fp16 finds out by trying. not_rerun: not known, as health.rerun is off."""

Record = Callable[..., object]
"""Takes the name of an event and its facts as keywords. Raises OSError."""


@dataclass(frozen=True)
class Trouble:
    """Why a run should go back, and the first step whose numbers were bad."""

    reason: str
    first_bad_step: int


def judge(
    history: LossHistory, step: int, result: StepResult, health: HealthConfig, least_scale: float
) -> tuple[LossHistory, Trouble | None]:
    """The history with a step added, and whether the run should go back because of that step.

    In fp16 a gradient that is not finite is a strike only where the loss scale cannot be lowered below `least_scale`,
    or where the loss is not finite either. A spike joins the history: where a run cannot go back, or is told not to,
    a level that stays is the new level.
    """
    if result.skipped:
        if is_scale_too_high(result, least_scale):
            return LossHistory(history.losses), None
        strikes = history.strikes + 1
        trouble = None
        # Not only at the first: a run that could not go back then is asked again after as many more.
        if strikes % health.max_strikes == 0:
            reason = f"{strikes} steps in a row were skipped: their gradients are not finite"
            trouble = Trouble(reason, step - strikes + 1)
        return LossHistory(history.losses, strikes), trouble
    limit, trouble = math.inf, None
    if len(history.losses) >= min(FEWEST_LOSSES, health.window_steps) and health.spike_deviations:
        middle = median(history.losses)
        deviation = median(abs(loss - middle) for loss in history.losses)
        limit = middle + health.spike_deviations * max(deviation, LEAST_DEVIATION * abs(middle))
    if result.loss > limit:
        reason = f"the loss {result.loss:.4g} is a spike: {median(history.losses):.4g} is usual, {limit:.4g} the limit"
        trouble = Trouble(reason, step)
    return LossHistory((*history.losses, result.loss)[-health.window_steps :]), trouble


def is_scale_too_high(result: StepResult, least_scale: float) -> bool:
    """True for one of fp16's trials: the skipped step's loss is finite, and the loss scale can still be lowered."""
    return math.isfinite(result.loss) and result.metrics.get("loss_scale", 0.0) > least_scale


@dataclass(frozen=True)
class Health:
    """Judges the steps of a run.

    `record` writes into its audit log, on rank 0; `say` tells the person at it; `report` keeps the verdict about a step
    where those find it who look from outside.
    """

    config: HealthConfig
    least_scale: float
    record: Record
    say: Callable[[str], object]
    report: Callable[[str], object]

    def judge(self, history: LossHistory, step: int, result: StepResult) -> tuple[LossHistory, Trouble | None]:
        """As the function; without health.rollback no history is kept."""
        if not self.config.rollback:
            return history, None
        return judge(history, step, result, self.config, self.least_scale)

    def retry_skipped(
        self, step: int, result: StepResult, attempt: Callable[[], StepResult], origins: Sequence[SampleOrigin]
    ) -> StepResult:
        """Name the samples of a step that was skipped, and run it once more with `attempt` where that may help.

        A skipped step has changed nothing and a step draws nothing from outside, so the second attempt does what the
        first would have done. All ranks call this alike. Returns the result that counts.
        """
        verdict: Verdict = "not_rerun"
        if "loss_scale" in result.metrics:
            if is_scale_too_high(result, self.least_scale):
                verdict = "loss_scale"
        elif self.config.rerun:
            result = attempt()  # on every rank: a step holds collectives
            verdict = "persistent" if result.skipped else "transient"
        shards = list(_by_shard(origins))
        first, last = origins[0].number, origins[-1].number
        names = "; ".join(f"{each['source']}/{each['shard']} ({_ranges(each['samples'])})" for each in shards)
        if len(names) > LONGEST_LIST:
            names = f"{names[:LONGEST_LIST]}... (audit.jsonl has all)"
        # Said before it is recorded: the disk may fail, and a person should know.
        message = _message(step, verdict, f"samples {first:,} to {last:,} of {names}")
        self.say(message)
        if verdict in ("transient", "persistent"):
            self.report(f"{verdict}: {message}")
        facts: dict[str, Any] = {"first_sample": first, "last_sample": last, "verdict": verdict, "shards": shards}
        try:
            self.record("skipped_step", step=step, **facts)
        except OSError as error:
            self.say(f"warning: step {step:,} is not in the audit log: {error}. Training goes on.")
        return result


def _message(step: int, verdict: Verdict, samples: str) -> str:
    skipped = f"step {step:,} skipped: its gradient is not finite; weights and moments are unchanged"
    return {
        "transient": f"step {step:,}: its gradient was not finite, and finite when the step was run again: a passing "
        f"fault of this hardware. The update is made. It has {samples}",
        "persistent": f"{skipped}. It was run twice: the fault is in the data or the model. It has {samples}",
        "loss_scale": f"{skipped}, and the loss scale is halved. It has {samples}",
        "not_rerun": f"{skipped}. It has {samples}",
    }[verdict]


def _by_shard(origins: Sequence[SampleOrigin]) -> Iterable[dict[str, Any]]:
    """Which samples, and which windows of the shard, a step has of each shard."""
    ordered = sorted(origins, key=lambda origin: (origin.source, origin.shard, origin.number))
    for (source, shard), group in groupby(ordered, key=lambda origin: (origin.source, origin.shard)):
        found = list(group)
        samples, windows = [origin.number for origin in found], [origin.window for origin in found]
        yield {"source": str(source), "shard": shard, "samples": samples, "windows": windows}


def _ranges(numbers: Sequence[int]) -> str:
    """Rising numbers in short: 3-5, 9."""
    parts = []
    for _, group in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]):
        run = [number for _, number in group]
        parts.append(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}")
    return ", ".join(parts)


SKIPPED_AT_END = 3
"""A run that ends on so many skipped steps in a row has not succeeded. One or two may be a batch, or a trial of fp16's
loss scale."""


@dataclass(frozen=True)
class StallLimit:
    """How many skipped steps in a row a run may have. They are counted over resumes: where a run was interrupted does
    not matter. All ranks see the same steps skipped, and so end alike."""

    max_skipped_steps: int
    precision: str

    def require_progress(self, state: TrainState) -> None:
        """Raise NoProgressError where a run that still has steps to make has only skipped ones for too long."""
        if self.max_skipped_steps and state.skipped_in_row >= self.max_skipped_steps:
            limit = f"health.max_skipped_steps = {self.max_skipped_steps}"
            raise NoProgressError(f"{skipped_text(state)} ({limit}). {self._advice(state)}")

    def require_result(self, state: TrainState) -> None:
        """Raise NoProgressError where a run that has made its last step has nothing to show for it."""
        skipped = state.skipped_in_row
        if skipped and (skipped == state.step or skipped >= SKIPPED_AT_END):
            more = f"More than {state.step:,} steps (train.steps, train.tokens or train.epochs) go on from here"
            raise NoProgressError(f"{skipped_text(state)}. {self._advice(state)} {more}.")

    def _advice(self, state: TrainState) -> str:
        """Ways to mend it; the audit log has the facts of each step."""
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
