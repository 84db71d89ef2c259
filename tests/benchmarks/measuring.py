"""Measuring contenders beside each other: interleaved rounds, medians, and ratios taken within a round.

A machine that others use changes its speed from minute to minute. So contenders take turns (A B A B), and a ratio is
that of two measurements of the same round; its median over the rounds is what is reported.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

import torch

Measurement = Callable[[], float]
"""Does the work once and returns the figure: a rate, or a time."""


@dataclass(frozen=True)
class Options:
    """How thoroughly to measure. `quick` takes small sizes, which show that everything runs and no more."""

    rounds: int = 5
    quick: bool = False


@dataclass(frozen=True)
class Row:
    """One contender's figures, one per round."""

    name: str
    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return median(self.values)

    def minus(self, other: "Row", name: str) -> "Row":
        """The difference in each round."""
        return Row(name, tuple(a - b for a, b in zip(self.values, other.values, strict=True)))


@dataclass(frozen=True)
class Table:
    """Rows of one comparison. `ours` names the row that the others are compared with; None: figures only.

    `better` says whether a higher or a lower figure is better.
    """

    title: str
    unit: str
    better: Literal["higher", "lower"]
    ours: str | None
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()

    def advantage(self, row: Row) -> tuple[float, ...]:
        """How many times better ours is than `row`, per round: above 1 we win."""
        ours = next(other for other in self.rows if other.name == self.ours)
        pairs = zip(ours.values, row.values, strict=True)
        return tuple(our / their if self.better == "higher" else their / our for our, their in pairs)

    def to_json(self) -> dict[str, Any]:
        rows = [
            {"name": row.name, "median": row.median, "values": row.values, "advantage": self._advantage_of(row)}
            for row in self.rows
        ]
        return {
            "title": self.title, "unit": self.unit, "better": self.better, "ours": self.ours, "rows": rows,
            "notes": self.notes,
        }  # fmt: skip

    def to_text(self) -> str:
        """Aligned columns, a title above and notes below."""
        compared = f"{self.ours} is x times as good (min-max)" if self.ours else ""
        header = ("", f"{self.unit} (median)", "min", "max", compared)
        cells = [header, *(self._cells(row) for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = [f"{self.title} - {self.better} is better"]
        for name, *figures in cells:
            padded = (figure.rjust(width) for figure, width in zip(figures, widths[1:], strict=True))
            lines.append("  ".join([f"  {name.ljust(widths[0])}", *padded]).rstrip())
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])

    def _cells(self, row: Row) -> tuple[str, ...]:
        figures = (row.median, min(row.values), max(row.values))
        ratio = ""
        if self.ours not in (None, row.name):
            advantage = self.advantage(row)
            ratio = f"{median(advantage):.2f} ({min(advantage):.2f}-{max(advantage):.2f})"
        return (row.name, *map(readable, figures), ratio)

    def _advantage_of(self, row: Row) -> float | None:
        return median(self.advantage(row)) if self.ours else None


def readable(value: float) -> str:
    """Four digits that matter, with thousands separated."""
    decimals = next((digits for limit, digits in ((1000, 0), (100, 1), (10, 2)) if abs(value) >= limit), 3)
    return f"{value:,.{decimals}f}"


def measure(contenders: Mapping[str, Measurement], rounds: int, warm_up: int = 1) -> tuple[Row, ...]:
    """Let the contenders take turns, `warm_up` times unrecorded and `rounds` times recorded."""
    values: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(warm_up + rounds):
        for name, measurement in contenders.items():
            value = measurement()
            if number >= warm_up:
                values[name].append(value)
    return tuple(Row(name, tuple(figures)) for name, figures in values.items())


@contextmanager
def one_core() -> Iterator[None]:
    """Keep this thread, and the threads that it starts meanwhile, on one core where the system allows it."""
    threads = torch.get_num_threads()
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    torch.set_num_threads(1)
    if cores:
        os.sched_setaffinity(0, {min(cores)})
    try:
        yield
    finally:
        if cores:
            os.sched_setaffinity(0, cores)
        torch.set_num_threads(threads)


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Let PyTorch compute in one thread; other threads may use the other cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
