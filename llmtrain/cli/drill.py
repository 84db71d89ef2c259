"""`llmtrain drill`: does a run survive what may happen to it?"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

if TYPE_CHECKING:
    from llmtrain.checks.drill.single_faults import Outcome
    from llmtrain.cli.tables import GrowingTable
    from llmtrain.config.schema import RunConfig


def drill(
    config: Annotated[Path, typer.Argument(help="A run's configuration; the runs are short.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Overrides.")] = None,
    only: Annotated[str, typer.Option(help="Only the faults whose name contains this.")] = "",
    kills: Annotated[
        int, typer.Option(min=0, max=10_000, help="In place of the faults: kill ranks at random so often.")
    ] = 0,
    mean_seconds: Annotated[float, typer.Option(min=0.1, max=1e6, help="Mean time between two of these kills.")] = 10.0,
    json: Annotated[bool, typer.Option("--json", help="A line of JSON per fault on stdout.")] = False,
) -> None:
    """Inject faults into short runs of a configuration, and say what follows.

    Processes are killed and stopped, files damaged, memory and disk made scarce, for real. For each fault: after how
    many seconds it was noticed, after how many the next step was finished, how many steps were lost, and whether the
    weights are those of the undisturbed run, bit for bit. Ends with 1 where one does not go as it must.

    With --kills, one longer run whose ranks are killed at random times.

    Told to stop (Ctrl-C, SIGTERM) it ends the fault in progress, says what was tried, and ends with 143.
    """
    from contextlib import nullcontext

    from llmtrain.checks.drill.faults import FAULTS
    from llmtrain.checks.drill.single_faults import UNDISTURBED, drill_config, try_fault, undisturbed
    from llmtrain.cli.tables import GrowingTable
    from llmtrain.errors import EXIT_TOLD_TWICE, ConfigError
    from llmtrain.preflight.storage import load_run

    faults = [fault for fault in FAULTS if only in fault.name]
    if not faults:
        raise ConfigError(f"--only {only}: no fault has that in its name: {'; '.join(f.name for f in FAULTS)}.")
    asked = load_run(config, overrides or []).config
    if kills:
        _punish(asked, kills, mean_seconds, json)
    run = drill_config(asked)
    faults = [fault for fault in faults if fault.least_ranks <= run.launch.num_workers]
    typer.echo(f"{len(faults)} faults, after one run without: {run.output_dir}", err=True)
    trying, failed, done = UNDISTURBED, 0, 0
    try:
        with nullcontext() if json else GrowingTable(_COLUMNS) as table:
            run = undisturbed(run)
            for fault in faults:
                trying = fault.name
                outcome = try_fault(run, fault)
                done += 1
                failed += bool(outcome.problems)
                _tell(outcome, table)
    except KeyboardInterrupt:
        counts = f"Tried: {done} of {len(faults)} faults, {done - failed} as they must, {failed} not"
        typer.echo(f"told to stop in {trying!r}, which does not count. {counts}", err=True)
        raise typer.Exit(EXIT_TOLD_TWICE) from None
    typer.echo(f"{done - failed} as they must, {failed} not", err=True)
    raise typer.Exit(1 if failed else 0)


def _punish(config: "RunConfig", kills: int, mean_seconds: float, as_json: bool) -> NoReturn:
    """The long drill. Ends the command."""
    from dataclasses import asdict
    from json import dumps

    from llmtrain.checks.drill.random_kills import punish
    from llmtrain.errors import EXIT_TOLD_TWICE

    try:
        done = punish(config, kills, mean_seconds)
    except KeyboardInterrupt:
        typer.echo("told to stop: the kills so far say nothing", err=True)
        raise typer.Exit(EXIT_TOLD_TWICE) from None
    typer.echo(
        dumps(asdict(done))
        if as_json
        else f"{done.kills} kills in {done.seconds:.0f} s: {done.restarts} restarts, {done.steps:,} steps, "
        f"{done.steps_lost:,} of them lost and done again, {done.useful_share:.0%} of the time useful, weights "
        f"{'identical' if done.same_weights else 'other'}"
    )
    for problem in done.problems:
        typer.echo(f"  {problem}", err=True)
    raise typer.Exit(1 if done.problems else 0)


def _tell(outcome: "Outcome", table: "GrowingTable | None") -> None:
    """A row of the table; without one, a line of JSON."""
    from dataclasses import asdict
    from json import dumps

    if table is None:
        typer.echo(dumps(asdict(outcome)))
    else:
        table.add(_row(outcome))
    for problem in outcome.problems:
        typer.echo(f"  {problem}", err=True)


_COLUMNS = ("fault", "noticed", "back", "steps lost", "weights", "exit")


def _row(outcome: "Outcome") -> list[str]:
    same = {True: "identical", False: "other", None: "-"}[outcome.same_weights]
    codes = ", ".join(map(str, outcome.exit_codes))
    noticed, back = _seconds(outcome.detected_seconds), _seconds(outcome.back_seconds)
    return [outcome.fault, noticed, back, str(outcome.steps_lost), same, codes]


def _seconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:.2f} s"
