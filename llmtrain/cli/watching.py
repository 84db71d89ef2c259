"""`llmtrain status`, `logs` and `report`: runs as they are seen from outside."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmtrain.errors import DataError

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live

    from llmtrain.report.run_view import RunView

import os
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from llmtrain.errors import ConfigError

if TYPE_CHECKING:
    from llmtrain.runs.rank_logs import Follower, Line


ATTENTION = ("failed", "stalled", "dead", "unknown", "damaged", "preempted", "restarting")
"""States of which a list of runs says more."""


def status(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, or folders that hold runs.", metavar="RUN")],
    as_json: Annotated[bool, typer.Option("--json", help="Print a line of JSON per run.")] = False,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Go on until all of them are over.")] = False,
) -> None:
    """Say how far runs are, whether their processes live, and what is to be done.

    Ends with 0 where that could be told of every run, whatever has become of it, and with 3 where a file is damaged.
    """
    from llmtrain.report.run_view import OVER, find_runs, iter_views

    folders = list(dict.fromkeys(folder for path in runs for folder in find_runs(path)))
    shown: list[RunView] = []
    live = _screen() if watch and not as_json and sys.stdout.isatty() else None
    try:
        for views in iter_views(folders, watch):
            if live:
                live.update(_drawing(views), refresh=True)
            elif [_news(view) for view in views] != [_news(view) for view in shown]:
                _print(views, as_json)
            shown = views
            if all(view.state in OVER for view in views):
                break
    finally:
        if live:
            live.stop()
    states = {view.state for view in shown}
    raise typer.Exit(DataError.exit_code if "damaged" in states else 1 if "unknown" in states else 0)


def _news(view: "RunView") -> dict[str, object]:
    """The facts whose change is worth another line: not that time has passed."""
    passing = ("seconds_left", "last_row_age_seconds", "checkpoint_age_seconds", "updated")
    return {key: value for key, value in asdict(view).items() if key not in passing}


def _screen() -> "Live":
    from rich.console import Console
    from rich.live import Live

    live = Live("", console=Console(highlight=False), auto_refresh=False)
    live.start()
    return live


def _drawing(views: list["RunView"]) -> "RenderableType":
    from rich.text import Text

    from llmtrain.cli.tables import build_table

    return Text("\n".join(in_words(views[0]))) if len(views) == 1 else build_table(*_table(views))


def _print(views: list["RunView"], as_json: bool) -> None:
    from llmtrain.cli.tables import print_table

    if as_json:
        typer.echo("\n".join(json.dumps(asdict(view)) for view in views))
    elif len(views) == 1:
        typer.echo("\n".join(in_words(views[0])))
    else:
        print_table(*_table(views))
    sys.stdout.flush()


def in_words(view: "RunView") -> list[str]:
    """Lines about one run: the most important one first, then what is known, then what is to be done."""
    from llmtrain.words import duration, short_number

    left = "" if view.seconds_left is None else f", {duration(view.seconds_left)} left"
    starting = ", no step since the start yet" if view.message == "starting" and view.state == "running" else ""
    how_far = "" if view.step is None else f", step {_steps(view)}{starting}{left}"
    metrics = [
        text
        for known, text in (
            (view.loss, f"loss {view.loss or 0:.4f}"),
            (view.valid_loss, f"validation {view.valid_loss or 0:.4f}"),
            (view.tokens_per_second, f"{short_number(view.tokens_per_second or 0)} tokens/s"),
            (view.last_row_age_seconds, f"recorded {duration(view.last_row_age_seconds or 0)} ago"),
        )
        if known is not None
    ]
    saved = ""
    if view.checkpoint_step is not None:
        saved = f"step {view.checkpoint_step:,}, {duration(view.checkpoint_age_seconds or 0)} ago, {view.checkpoint}"
    facts = {
        "metrics": ", ".join(metrics),
        "attempt": "" if view.attempt is None else f"{view.attempt}{_since(view.since)}",
        "process": _process(view),
        "checkpoint": saved,
        "cause": view.cause,
        "verdict": view.verdict,
        "message": "" if view.message in ("", "starting", "training", view.cause) else view.message,
        "next": view.next_action,
    }
    lines = (f"  {name:<11} {text}" for name, text in facts.items() if text)
    return [f"{view.run}: {view.state}{how_far}", *lines]


def _table(views: list["RunView"]) -> tuple[list[str], list[list[str]]]:
    from llmtrain.words import duration, short_number

    header = ["run", "state", "step", "loss", "tokens/s", "left", "attempt", "saved", "host", "note"]
    rows = []
    for view in views:
        # One line per run, whatever a cause holds.
        note = " ".join((view.cause or view.message).split()) if view.state in ATTENTION else ""
        rows.append(
            [
                view.run,
                view.state,
                _steps(view),
                "" if view.loss is None else f"{view.loss:.4f}",
                "" if view.tokens_per_second is None else short_number(view.tokens_per_second),
                "" if view.seconds_left is None else duration(view.seconds_left),
                "" if view.attempt is None else str(view.attempt),
                "" if view.checkpoint_step is None else f"{view.checkpoint_step:,}",
                view.host,
                note,
            ]
        )
    return header, rows


def _steps(view: "RunView") -> str:
    if view.step is None or not view.total_steps:
        return ""
    if view.step > view.total_steps:
        return f"{view.step:,}, more than the {view.total_steps:,} that were asked for last"
    return f"{view.step:,} of {view.total_steps:,} ({view.step / view.total_steps:.0%})"


def _since(moment: str) -> str:
    from datetime import UTC, datetime

    from llmtrain.words import duration

    if not moment:
        return ""
    begun = datetime.fromisoformat(moment)
    return f", started {begun:%Y-%m-%d %H:%M:%S} UTC, {duration((datetime.now(UTC) - begun).total_seconds())} ago"


def _process(view: "RunView") -> str:
    if view.pid is None:
        return ""
    if view.alive is None:
        return f"{view.pid} on {view.host}, last heard of at {view.updated}"
    return f"{view.pid} on {view.host}, {'alive' if view.alive else 'gone'}"


FOLLOWED_LINES = 10

LOOK_SECONDS = 0.5

LOOKS_TO_BE_SURE = 10

RANK_COLOURS = ("cyan", "yellow", "green", "magenta", "blue", "red")


def logs(
    run: Annotated[Path, typer.Argument(help="A run folder.", metavar="RUN")],
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the run is over.")] = False,
    rank: Annotated[int | None, typer.Option(min=0, max=2**20, help="Only this rank's.", show_default=False)] = None,
    lines: Annotated[
        int | None,
        typer.Option(
            "--lines", "-n", min=0, max=10**9, help="Only the last ones of each rank; with --follow 10, else all."
        ),
    ] = None,
) -> None:
    """Print the logs of a run's ranks, attempt by attempt; several ranks' lines begin with the rank.

    With --follow, what is written from now on too: by ranks that are started again, after a requeue, and by new ones.
    It ends by itself when the run is over, and goes on while a run that was told to stop waits for its next start.
    """
    from llmtrain.report.run_view import is_run
    from llmtrain.runs.rank_logs import Follower, log_path, rank_files, written_lines

    if not is_run(run):
        raise ConfigError(f"{run}: not a run folder. Give the folder that `llmtrain train` wrote: <output_dir>/<name>.")

    def chosen() -> dict[int, Path]:
        return {number: path for number, path in rank_files(run).items() if rank in (None, number)}

    if not chosen() and not follow:
        ranks = ", ".join(map(str, rank_files(run)))
        nothing = f"--rank {rank}: {run} has no log of it. Those that it has: {ranks}."
        raise ConfigError(nothing if rank is not None and ranks else f"{run}: no rank has written a log yet.")
    say = _printer(named=rank is None)
    follower = Follower(chosen)
    if not follow:
        say(written_lines(chosen(), lines))
        return
    ends = follower.skip_written()
    num_lines = FOLLOWED_LINES if lines is None else lines
    say(written_lines({number: log_path(run, number) for number in ends}, num_lines, ends))
    _follow(run, follower, say)


def _follow(run: Path, follower: "Follower", say: Callable[[Iterable["Line"]], None]) -> None:
    """Print new lines until nobody but a person will bring more."""
    from llmtrain.report.run_view import OVER, look

    waiting, gone = False, 0
    while True:
        # The state first: what was written before the run was over is there afterwards.
        view = look(run)
        gone = gone + 1 if view.state == "dead" else 0
        say(follower.new_lines())
        # A process that is gone may be one that is being replaced.
        if view.state in OVER and gone in (0, LOOKS_TO_BE_SURE):
            say(follower.unfinished_lines())
            typer.echo(f"{run}: {view.state}{f': {view.cause}' if view.cause else ''}", err=True)
            return
        if view.state == "preempted" and not waiting:
            typer.echo(f"{run}: told to stop; waiting for its next start (Ctrl-C ends this)", err=True)
        waiting = view.state == "preempted"
        time.sleep(LOOK_SECONDS)


def _printer(named: bool) -> Callable[[Iterable["Line"]], None]:
    coloured = sys.stdout.isatty() and not os.environ.get("NO_COLOR")

    def say(lines: Iterable["Line"]) -> None:
        for line in lines:
            head = f"{line.rank:>2} | " if named else ""
            if coloured and head:
                head = typer.style(head, fg=RANK_COLOURS[line.rank % len(RANK_COLOURS)])
            typer.echo(f"{head}{line.text}")
        sys.stdout.flush()

    return say


def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders; several are compared.", metavar="RUN")],
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Page to write; default RUN/report.html, for several runs ./comparison.html."),
    ] = None,
) -> None:
    """Write one self-contained HTML page with the curves, the configuration and the environment; print its path."""
    from llmtrain.report.page import write_report

    page = out or (runs[0] / "report.html" if len(runs) == 1 else Path("comparison.html"))
    write_report(runs, page)
    typer.echo(page)
