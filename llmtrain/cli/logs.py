"""`llmtrain logs`: what the ranks of a run have printed."""

import os
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmtrain.errors import ConfigError

if TYPE_CHECKING:
    from llmtrain.runs.rank_logs import Follower, Line

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
        raise ConfigError(_nothing(run, rank, sorted(rank_files(run))))
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


def _nothing(run: Path, rank: int | None, ranks: list[int]) -> str:
    if rank is not None and ranks:
        return f"--rank {rank}: {run} has no log of it. Those that it has: {', '.join(map(str, ranks))}."
    return f"{run}: no rank has written a log yet."
