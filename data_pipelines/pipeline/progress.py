"""What a pipeline says while it works: a bar on a terminal, else a line for each stage and now and then one between."""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from llmtrain.words import counted, duration, short_bytes, short_number

SECONDS_BETWEEN = 15.0
"""Between two lines where there is no terminal."""

Advance = Callable[[Mapping[str, Any]], None]


class Progress:
    """Writes to stderr, or wherever `console` writes."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True, highlight=False, soft_wrap=True)
        self._looked = 0.0

    def say(self, line: str) -> None:
        """A line of its own."""
        self._console.print(line, markup=False)

    def planned(self, done: int, total: int) -> None:
        """So many files of so many are hashed."""
        now = time.monotonic()
        if done == total or now - self._looked > SECONDS_BETWEEN:
            self._looked = now
            self.say(f"inputs: {done:,} of {counted(total, 'file')} known")

    @contextmanager
    def stage(self, name: str, total: int, done: int) -> Iterator[Advance]:
        """A stage of so many tasks, of which some are done already. Each further one is told with its counters."""
        seen = _Seen(total - done)
        begin = last = time.monotonic()
        if not self._console.is_terminal or total - done == 0:

            def advance(counters: Mapping[str, Any]) -> None:
                nonlocal last
                seen.add(counters)
                if (now := time.monotonic()) - last > SECONDS_BETWEEN:
                    last = now
                    self.say(f"{name}: {done + seen.tasks:,} of {total:,} · {seen.rate(now - begin)}")

            yield advance
        else:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(30),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[rate]}"),
            )
            with Bars(*columns, console=self._console, transient=True) as bars:
                bar = bars.add_task(name, total=total, completed=done, rate="")

                def advance(counters: Mapping[str, Any]) -> None:
                    seen.add(counters)
                    bars.update(bar, advance=1, rate=seen.rate(time.monotonic() - begin))

                yield advance
        if total - done:
            kept = f", {counted(done, 'task')} done before" if done else ""
            self.say(f"{name}: {seen.rate(time.monotonic() - begin, whole=True)}{kept}")


class _Seen:
    """Sums over the tasks that have been done since the stage began."""

    def __init__(self, left: int) -> None:
        self.tasks = 0
        self._left = left
        self._documents = self._bytes = self._kept = 0
        self._dropped: Counter[str] = Counter()
        self._other: Counter[str] = Counter()

    def add(self, counters: Mapping[str, Any]) -> None:
        self.tasks += 1
        if "steps" not in counters:
            self._documents += counters.get("documents", counters.get("seen", counters.get("samples", 0)))
            self._bytes += counters.get("bytes", 0)
            self._other.update({key: counters[key] for key in ("removed", "edges", "tokens") if key in counters})
            return
        self._kept += counters["kept"]["documents"]
        for step in counters["steps"]:
            self._dropped[step["name"]] += sum(step["dropped"].values())
        # Behind the first segment nothing is read: what was seen is what the first step saw.
        seen = counters["steps"][0]["seen"] if counters["steps"] else counters["kept"]["documents"]
        self._documents += counters["read"]["documents"] or seen
        self._bytes += counters["read"]["bytes"] or counters["kept"]["bytes"]

    def rate(self, seconds: float, whole: bool = False) -> str:
        """Speeds and what was dropped; in the end with all sums and the time."""
        parts = []
        if self._documents:
            parts.append(f"{counted(self._documents, 'document')}" if whole else "")
            parts.append(f"{short_number(self._documents / max(seconds, 1e-9))}{'' if whole else ' documents'}/s")
        if self._bytes:
            parts.append(f"{short_bytes(self._bytes / max(seconds, 1e-9))}/s")
        dropped = sum(self._dropped.values())
        if dropped:
            share = dropped / max(1, dropped + self._kept)
            most = ", ".join(f"{name} {short_number(count)}" for name, count in self._dropped.most_common(3) if count)
            parts.append(f"dropped {share:.1%} ({most})")
        parts += [f"{short_number(count)} {name}" for name, count in self._other.items()]
        if whole:
            parts.append(duration(seconds))
        return " · ".join(part for part in parts if part)
