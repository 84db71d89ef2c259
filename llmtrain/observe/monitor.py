"""The loop's reports, timed, averaged and handed to every tracker; and the arithmetic that a token costs."""

import math
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import torch

from llmtrain.config.model import ModelConfig
from llmtrain.config.parameters import FrozenNames, is_of_label_head, parameter_shapes
from llmtrain.config.sequence_lengths import Lengths
from llmtrain.errors import RunFolderInUseError
from llmtrain.observe.console import ConsoleTracker
from llmtrain.observe.trackers import Tracker
from llmtrain.values.progress import RESUMED_FROM, SOURCE_TOKENS, TASK_SECONDS, Phase, Reading, Row, StepResult

_TERA = 1e12

PEAK_FLOPS: tuple[tuple[str, float], ...] = (
    ("H100", 989 * _TERA),
    ("H200", 989 * _TERA),
    ("A100", 312 * _TERA),
    ("V100", 125 * _TERA),
)
"""Dense bf16 peak by a part of the device's name (V100: fp16), SXM boards, from the makers' data sheets."""

_SLOWER_BOARDS = ("H100 PCIe", "H100 NVL", "H200 NVL")
"""Boards with a lower peak than the table's: none is reported for them rather than a wrong one."""


def flops_per_sample(config: ModelConfig, lengths: Lengths, frozen: FrozenNames | None = None) -> float:
    """Floating-point operations to train on one sample, forward and backward, in the "full" convention.

    Per position 6 x (parameters in matrix products) + 12 x num_heads x head_dim x keys in each layer: attention is not
    halved for causality, nor reduced for sparse kinds; the input embedding is left out, recomputation is not counted
    (Chowdhery et al. 2022, appendix B). Of experts, those count that a token goes to. A weight that is `frozen` has no
    gradient: 4 in place of 6. Raises ValueError while the vocabulary size is not known.
    """
    frozen = FrozenNames() if frozen is None else frozen
    both = config.family == "encoder_decoder"
    encoder, main = (lengths.encoder if both else lengths.main), lengths.main
    # A head for labels is of those that are counted by their shapes; that of a classifier meets one position.
    head = "embeddings.word.weight" if config.ties_head else "head.weight"
    products = 0.0
    if not config.predicts_labels:
        products = main * config.hidden_size * config.vocabulary * (4.0 if head in frozen else 6.0)
    for name, shape in parameter_shapes(config).items():
        if len(shape) < 2 or name.startswith(NO_PRODUCTS) or name.endswith(".position_bias.weight"):
            continue
        of_memory = ".cross_attention.k." in name or ".cross_attention.v." in name
        positions = encoder if name.startswith("encoder.") or of_memory else main
        if config.head == "classifier" and is_of_label_head(name):
            positions = 1
        share = config.moe.choices / config.moe.num_experts if config.moe and ".moe.experts." in name else 1.0
        products += positions * prod(shape) * share * (4 if name in frozen else 6)
    scores = config.encoder_layers * encoder**2 + config.decoder_layers * main * (main + (encoder if both else 0))
    return products + 12.0 * config.num_heads * config.head_size * scores


NO_PRODUCTS = ("embeddings.", "head.")
"""The head is counted as one whether it is tied or not."""


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 operations per second that a device can do at best; None where it is not known, as on a CPU."""
    if any(board in device_name for board in _SLOWER_BOARDS):
        return None
    return next((flops for part, flops in PEAK_FLOPS if part in device_name), None)


def mfu(tokens_per_second: float, flops_per_token: float, peak: float) -> float:
    """Model FLOP utilization, 0 to 1: `peak` is that of all devices together, in operations per second."""
    return tokens_per_second * flops_per_token / peak


Status = Literal["done", "preempted", "failed"]


@dataclass(frozen=True)
class RunPlan:
    """The begin and end of a run, and the cost of a token.

    `start_step` and `start_tokens` are the state that the run continues from. `peak_flops` is that of all devices
    together, in operations per second; None where it is not known. `attempt` counts the starts of the run, from 1.
    """

    last_step: int
    start_step: int = 0
    start_tokens: int = 0
    log_every_steps: int = 1
    sources: tuple[str, ...] = ()
    """Names of the sources that rows have columns for."""
    flops_per_token: float = 0.0
    peak_flops: float | None = None
    attempt: int = 1


@dataclass
class _Interval:
    """Sums since the last recorded row."""

    steps: int = 0
    tokens: int = 0
    skipped: int = 0
    step_seconds: float = 0.0
    data_seconds: float = 0.0
    checkpoint_seconds: float = 0.0


class Monitor:
    """Turns what the loop reports into rows and messages. A tracker that fails is named once and stops nothing.

    Only RunFolderInUseError is passed on, and no tracker behind the one that raises it hears of the row.

    A rank that records nothing has no trackers and no console. Call `step` once the step's loss is on the host: the
    time up to then is the step's.
    """

    def __init__(
        self,
        plan: RunPlan,
        trackers: Sequence[Tracker] = (),
        console: ConsoleTracker | None = None,
        clock: Callable[[], float] = time.perf_counter,
        on_phase: Callable[[Phase, int], None] = lambda phase, step: None,
        sample: Callable[[], Mapping[str, float]] = dict,
    ) -> None:
        """`on_phase` hears of every phase that begins, with the number of steps that are done.

        `sample` is asked for more columns of each training row.
        """
        self._plan = plan
        self._trackers: list[Tracker] = [*trackers, *([console] if console else [])]
        self._console = console
        self._clock = clock
        self._on_phase = on_phase
        self._sample = sample
        self._step, self._has_stepped = plan.start_step, False
        self._tokens = plan.start_tokens
        self._interval = _Interval()
        self._failed_trackers: set[int] = set()
        self._step_began = clock()
        self._evaluate_seconds = 0.0
        self._went_back_to: int | None = None
        on_phase("setup", plan.start_step)

    @contextmanager
    def phase(self, name: Literal["data", "evaluate", "checkpoint"]) -> Iterator[None]:
        """Time a part of the loop. A step's time includes waiting for data, not evaluation and checkpoints."""
        began = self._clock()
        self._on_phase(name, self._step)
        try:
            yield
        finally:
            seconds = self._clock() - began
            self._on_phase("step" if self._has_stepped else "setup", self._step)
            if name == "data":
                self._interval.data_seconds += seconds
            else:
                self._step_began += seconds
            if name == "checkpoint":
                self._interval.checkpoint_seconds += seconds
            elif name == "evaluate":
                self._evaluate_seconds += seconds

    def step(self, step: int, lr: float, result: StepResult, reading: Reading | None = None) -> None:
        """Record that step `step` (from 1) is done, and what it has read."""
        now = self._clock()  # first: what is counted below is not part of the step
        interval = self._interval
        interval.steps += 1
        # Rates count what was read; of targets some objectives have few.
        interval.tokens += reading.tokens if reading else result.num_tokens
        interval.step_seconds += now - self._step_began
        interval.skipped += result.skipped
        self._step, self._has_stepped = step, True
        self._on_phase("step", step)
        self._step_began = self._clock()  # who listens may have written a trace: it is not part of a step
        self._tokens += result.num_tokens
        if self._console:
            self._console.advance(step)
        if step == 1 or step == self._plan.last_step or step % self._plan.log_every_steps == 0:
            self._record({**self._training_row(step, lr, result), **self._source_columns(reading)})
            self._interval = _Interval()

    def evaluated(
        self, step: int, valid_loss: float, num_tokens: int, metrics: Mapping[str, float] | None = None
    ) -> None:
        """Record the mean loss over `num_tokens` targets of the validation data. Call it after the phase.

        `metrics` are those of a head for labels or of a distillation, in place of the perplexity that tokens have.
        """
        measured = {f"valid_{name}": value for name, value in (metrics or {}).items()}
        row = {
            "step": step,
            "time": time.time(),
            "valid_loss": valid_loss,
            **(measured or {"valid_perplexity": perplexity(valid_loss)}),
            "valid_tokens": num_tokens,
            "valid_seconds": self._evaluate_seconds,
        }
        self._evaluate_seconds = 0.0
        self._record(row)

    def measured(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of tasks, by the names of their columns. Call it after the phase."""
        row = {"step": step, "time": time.time(), **metrics, TASK_SECONDS: self._evaluate_seconds}
        self._evaluate_seconds = 0.0
        self._record(row)

    def went_back(self, step: int, tokens: int) -> None:
        """The run continues from an earlier step: the next row says so, as the first one after a resume does."""
        self._step, self._tokens = step, tokens
        self._interval = _Interval()
        self._went_back_to = step

    def say(self, text: str) -> None:
        """Tell the person at the terminal one thing, above the progress bar."""
        if self._console:
            self._guard(self._console, lambda: self._console.say(text) if self._console else None)

    def flush(self) -> None:
        """Make all rows durable; call it before a checkpoint becomes visible."""
        for tracker in self._trackers:
            self._guard(tracker, tracker.flush)

    def close(self, status: Status) -> None:
        """End every tracker. The console goes last: the others may have something to say.

        Raises RunFolderInUseError where a tracker does; then only the console is ended.
        """
        try:
            for tracker in self._trackers:
                self._guard(tracker, lambda tracker=tracker: tracker.close(status))
        except RunFolderInUseError:
            if self._console:
                self._console.close("failed")
            raise

    def _training_row(self, step: int, lr: float, result: StepResult) -> Row:
        interval = self._interval
        tokens_per_second = interval.tokens / max(interval.step_seconds, 1e-9)
        row: dict[str, Any] = {
            "step": step,
            "time": time.time(),
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "lr": lr,
            "tokens": self._tokens,
            "tokens_per_second": tokens_per_second,
            "step_seconds": interval.step_seconds / interval.steps,
            "data_seconds": interval.data_seconds / interval.steps,
            "checkpoint_seconds": interval.checkpoint_seconds,
            "memory_bytes": peak_memory_bytes(),
            "skipped": interval.skipped,
            "attempt": self._plan.attempt,
        }
        if self._plan.peak_flops is not None:
            row["mfu"] = mfu(tokens_per_second, self._plan.flops_per_token, self._plan.peak_flops)
        return {**row, **result.metrics, **self._sample(), **row}  # what every row has stands first and wins

    def _source_columns(self, reading: Reading | None) -> Row:
        """Where the run is in its stream of samples, and the tokens of each source so far where there are several."""
        if reading is None:
            return {}
        names, row = self._plan.sources, {"samples": reading.position}
        if len(names) > 1:
            row |= {
                f"{SOURCE_TOKENS}{name}": n
                for name, n in zip(names, reading.source_tokens(row["samples"]), strict=True)
            }
        return row

    def _record(self, row: Row) -> None:
        if self._went_back_to is not None:
            row, self._went_back_to = {**row, RESUMED_FROM: self._went_back_to}, None
        for tracker in self._trackers:
            self._guard(tracker, lambda tracker=tracker: tracker.log(row))

    def _guard(self, tracker: Tracker, action: Callable[[], None]) -> None:
        try:
            action()
        except RunFolderInUseError:  # what another process records now must stay as it is
            raise
        except Exception as error:  # whatever a tracker's library raises, training goes on
            if id(tracker) not in self._failed_trackers:
                self._failed_trackers.add(id(tracker))
                if tracker is not self._console:
                    self.say(f"warning: {type(tracker).__name__} cannot record: {error}. Training goes on.")


def perplexity(loss: float) -> float:
    """exp(loss), or infinity where that is too large for a float."""
    return math.exp(loss) if loss < 709 or math.isnan(loss) else math.inf


def peak_memory_bytes() -> int:
    """Most memory that this process has held: allocated on its device where it has one, else resident."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
