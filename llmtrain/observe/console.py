"""The progress that a person sees: a bar on a terminal, plain lines elsewhere, all of it on stderr."""

import time
from collections.abc import Callable
from typing import Any, TextIO

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from llmtrain.config.metrics import titled
from llmtrain.values.label_metrics import LABEL_METRICS
from llmtrain.values.progress import DISTILL_LOSS, TASK, Row, row_kind, task_title
from llmtrain.words import counted, duration, short_number

PLAIN_LINE_SECONDS = 5.0
QUIET_SECONDS = 60.0
_SMALLEST_BAR = 8


class ConsoleTracker:
    """Shows progress from `start_step` to `last_step`. `advance` is called every step, `log` for recorded rows.

    `title` heads the output. Colours are off where NO_COLOR is set. Without a terminal, and in `log`, which gets all of
    it in plain lines, there is at most one progress line in PLAIN_LINE_SECONDS, and one for each hundredth of the run
    or each QUIET_SECONDS.
    """

    def __init__(
        self,
        title: str,
        start_step: int,
        last_step: int,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
        log: TextIO | None = None,
    ) -> None:
        self._console = console or Console(stderr=True, highlight=False)
        self._log = Console(file=log, highlight=False, no_color=True, force_terminal=False) if log else None
        self._clock = clock
        self._status = StatusLine(start_step, last_step, clock)
        self._said_at = -float("inf")
        self._said_step = start_step
        self._live: Live | None = None
        after = f"from step {start_step:,} " if start_step else ""
        self._print(f"[bold]{escape(title)}[/]: {after}to step {last_step:,}")
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            self._live = Live(self._status, console=self._console, refresh_per_second=4)
            self._live.start()

    def advance(self, step: int) -> None:
        """One more step is done; the bar shows it at its next redraw."""
        self._status.step = step

    def log(self, row: Row) -> None:
        self._status.step = row["step"]
        self._status.row.update(row)
        if "valid_loss" in row:
            self.say(f"step {row['step']:,}: validation loss {row['valid_loss']:.4f}, {quality_text(row)}")
        elif row_kind(row) == "tasks":
            found = (f"{task_title(key)} {row[key]:.4f}" for key in row if key.startswith(TASK))
            self.say(f"step {row['step']:,}: {', '.join(found)}")
        elif (self._live is None or self._log) and self._line_is_due(row["step"]):
            self._said_at, self._said_step = self._clock(), row["step"]
            self._print(escape("  ".join(self._status.cells(width=None))), on_terminal=self._live is None)

    def say(self, text: str) -> None:
        """Print one line above the bar."""
        self._print(escape(text))

    def flush(self) -> None:
        """Nothing to do: what is printed is seen."""

    def close(self, status: str) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
        colour = {"done": "green", "preempted": "yellow", "failed": "red"}.get(status, "default")
        step = f"{self._status.step:,}/{self._status.last_step:,}"
        text = f"[{colour}]{escape(status)}[/] at step {step} after {duration(self._status.elapsed_seconds)}"
        self._print(f"{text}: saved; the same command continues" if status == "preempted" else text)

    def _print(self, markup: str, on_terminal: bool = True) -> None:
        # soft_wrap: a long path is one line, to be copied whole.
        if on_terminal:
            self._console.print(markup, soft_wrap=True)
        if self._log:
            self._log.print(markup, soft_wrap=True)

    def _line_is_due(self, step: int) -> bool:
        if step == self._status.last_step:
            return True
        waited = self._clock() - self._said_at
        moved = (step - self._said_step) * 100 >= self._status.last_step
        return waited >= PLAIN_LINE_SECONDS and (moved or waited >= QUIET_SECONDS)


def quality_text(row: Row) -> str:
    """What an evaluation says beside the loss: the perplexity of tokens, or the metrics of labels."""
    if "valid_perplexity" in row:
        tokens = f" of {row['valid_tokens']:,} tokens" if "valid_tokens" in row else ""
        taught = f", {row[f'valid_{DISTILL_LOSS}']:.4f} from the teacher" if f"valid_{DISTILL_LOSS}" in row else ""
        return f"perplexity {row['valid_perplexity']:,.2f}{taught}{tokens}"
    found = [f"{titled(name).lower()} {row[f'valid_{name}']:.4f}" for name in LABEL_METRICS if f"valid_{name}" in row]
    return f"{', '.join(found)} of {counted(row['valid_tokens'], 'label')}"


class StatusLine:
    """One line that says where the run is, as wide as the terminal and never wider."""

    def __init__(self, start_step: int, last_step: int, clock: Callable[[], float]) -> None:
        self.last_step = last_step
        self.row: dict[str, Any] = {}
        self._clock = clock
        self._started_at = clock()
        self._step = start_step
        self._first: tuple[int, float] | None = None
        """The first step that was done, and when: the pace counts from there."""

    @property
    def step(self) -> int:
        """The last step that is done."""
        return self._step

    @step.setter
    def step(self, step: int) -> None:
        went_on, went_back = step > self._step, step < self._step
        if went_back or (went_on and self._first is None):
            self._first = (step, self._clock())
        self._step = step

    @property
    def elapsed_seconds(self) -> float:
        return self._clock() - self._started_at

    @property
    def seconds_left(self) -> float | None:
        """By the pace since the first step was done, whose time is that of compilers, allocators and first data."""
        if self._first is None or self._step == self._first[0]:
            return None
        step, since = self._first
        return (self._clock() - since) / (self._step - step) * (self.last_step - self._step)

    def cells(self, width: int | None) -> list[str]:
        """The texts in order of display; those that matter least are left out where they do not fit `width`."""
        # (importance, text): a small number stays longest.
        ranked = [(0, f"{self.step:,}/{self.last_step:,}")]
        row = self.row
        if "loss" in row:
            ranked.append((1, f"loss {row['loss']:.4f}"))
        if "valid_loss" in row:
            ranked.append((4, f"valid {row['valid_loss']:.4f}"))
        if "tokens_per_second" in row:
            ranked.append((3, f"{short_number(row['tokens_per_second'])} tok/s"))
        if row.get("mfu") is not None:
            ranked.append((5, f"MFU {100 * row['mfu']:.1f}%"))
        gone = f"{duration(self.elapsed_seconds)} gone"
        if self._first is None:  # the bar may stand anywhere, and does not move yet
            ranked.append((2, f"starting, {gone}"))
        else:
            ranked.append((6, gone))
        if self.seconds_left is not None and self.step < self.last_step:
            ranked.append((2, f"{duration(self.seconds_left)} left"))
        while width is not None and len(ranked) > 1 and sum(len(text) + 2 for _, text in ranked) > width:
            ranked.remove(max(ranked))
        return [text for _, text in ranked]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        grid = Table.grid(expand=True, padding=(0, 2, 0, 0))
        grid.add_column(ratio=1)
        cells = self.cells(options.max_width - _SMALLEST_BAR)
        for _ in cells:
            grid.add_column(no_wrap=True)
        bar = ProgressBar(total=max(1, self.last_step), completed=self.step)
        grid.add_row(bar, *(Text(cell, no_wrap=True, overflow="ellipsis") for cell in cells))
        yield grid
