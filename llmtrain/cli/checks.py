"""`llmtrain doctor`, `drill` and `parity`: whether this machine, supervision and layouts do what they must."""

import json
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from llmtrain.checks.doctor.findings import Finding

from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from llmtrain.checks.drill.single_faults import Outcome
    from llmtrain.cli.tables import GrowingTable
    from llmtrain.config.schema import RunConfig


WIDTH = 110
MARKS = {"ok": ("ok", "green"), "limited": ("!", "yellow"), "missing": ("-", "yellow"), "broken": ("x", "red")}
"""The mark before a finding, and its colour."""


def doctor(
    output_dir: Annotated[Path, typer.Option(help="Where runs would be written.")] = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what is installed, which devices there are, and what each engine and launcher can do here.

    Engines make a tiny step, and two ranks meet; what is tried is said on stderr as it ends. With everything that is
    missing or broken stands the command that mends it. Ends with 0 where training is possible, with 1 otherwise.
    """
    from dataclasses import asdict

    from llmtrain.checks.doctor.examination import examine
    from llmtrain.checks.doctor.findings import can_train

    findings = examine(output_dir, lambda line: typer.echo(line, err=True))
    possible = can_train(findings)
    if as_json:
        facts = {"can_train": possible, "findings": [asdict(finding) for finding in findings]}
        typer.echo(json.dumps(facts, indent=1))
    else:
        _print_findings(findings)
        broken = [finding.name for finding in findings if finding.state == "broken"]
        also = f" Broken: {', '.join(broken)}." if broken else ""
        typer.echo(f"\nTraining is {'' if possible else 'not '}possible here.{also}")
    raise typer.Exit(0 if possible else 1)


def _print_findings(findings: list["Finding"]) -> None:
    from rich.console import Console
    from rich.markup import escape

    console = Console(highlight=False, soft_wrap=True)
    section = ""
    for finding in _with_packages_together(findings):
        if finding.section != section:
            section = finding.section
            console.print(f"[bold]{section}[/]")
        mark, colour = MARKS[finding.state]
        head = f"  {mark:<2} {finding.name:<14} "
        lines = textwrap.wrap(finding.text, WIDTH - len(head), break_on_hyphens=False) or [""]
        console.print(f"  [{colour}]{mark:<2}[/] {escape(f'{finding.name:<14} {lines[0]}')}")
        for line in lines[1:]:
            console.print(" " * len(head) + escape(line))
        # A command is one line, to be copied whole.
        if finding.mend:
            console.print(" " * len(head) + f"mend: {escape(finding.mend)}")


def _with_packages_together(findings: list["Finding"]) -> list["Finding"]:
    """The packages that are as they should be in one line, the others on their own."""
    from llmtrain.checks.doctor.findings import Finding

    right = [f for f in findings if f.section == "packages" and f.state == "ok" and f.name != "Python"]
    line = Finding("packages", "packages", "ok", ", ".join(f"{f.name} {f.text}" for f in right))
    rest = [finding for finding in findings if finding not in right]
    first = next((number for number, finding in enumerate(rest) if finding.name != "Python"), len(rest))
    return [*rest[:first], *([line] if right else []), *rest[first:]]


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
        _kill_at_random(asked, kills, mean_seconds, json)
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


def _kill_at_random(config: "RunConfig", kills: int, mean_seconds: float, as_json: bool) -> NoReturn:
    """The long drill. Ends the command."""
    from dataclasses import asdict
    from json import dumps

    from llmtrain.checks.drill.random_kills import kill_at_random
    from llmtrain.errors import EXIT_TOLD_TWICE

    try:
        done = kill_at_random(config, kills, mean_seconds)
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


def parity(
    config: Annotated[Path, typer.Argument(help="A run's configuration; its model is shrunk.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Overrides.")] = None,
    layouts: Annotated[
        str, typer.Option(help="Only these, separated by commas, for example megatron:tp2+sp,deepspeed:dp2+zero3.")
    ] = "",
    ranks: Annotated[int, typer.Option(min=1, max=64, help="All legal layouts with up to so many ranks.")] = 2,
    steps: Annotated[int, typer.Option(min=1, max=10_000, help="Steps to compare.")] = 5,
    precision: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "fp32",
    json: Annotated[bool, typer.Option("--json", help="A line of JSON per layout on stdout.")] = False,
) -> None:
    """Run layouts and engines as real processes on this machine's cores and compare every number with one process.

    Step-0 weights must be equal bit for bit; losses, norms, every gradient and the weights after the last step within
    the parity levels. Ends with 1 where a layout differs, and names the first tensor that does.
    """
    from contextlib import nullcontext
    from json import dumps

    from llmtrain.checks.parity.compare import COLUMNS, compare_layouts
    from llmtrain.checks.parity.layouts import iter_candidates, own_candidate, parse_candidate, shrink
    from llmtrain.cli.tables import GrowingTable
    from llmtrain.config.reading.load import load_config
    from llmtrain.errors import ConfigError

    if precision not in ("fp32", "bf16", "fp16"):
        raise ConfigError(f"--precision {precision}: must be fp32, bf16 or fp16.")
    whole = load_config(config, overrides or []).config
    small = shrink(whole, precision, 0 if layouts else ranks)
    wanted = [parse_candidate(text.strip(), small) for text in layouts.split(",")] if layouts else None
    own = own_candidate(whole, small, ranks)
    others = [other for other in iter_candidates(small, ranks) if own is None or other.name != own.name]
    candidates = wanted or ([own] if own else []) + others
    if wanted is None and own is None and whole.launch.num_workers > 1:
        typer.echo(f"the run's own layout takes more ranks than --ranks {ranks}: it is not compared", err=True)
    typer.echo(f"comparing {len(candidates)} layouts with one process, {steps} steps of {precision}", err=True)
    if small.model.activation != whole.model.activation:
        kind, instead = whole.model.activation, small.model.activation
        typer.echo(
            f"{instead} for {kind}, whose slope jumps at 0: rounding there changes gradients in any layout", err=True
        )
    failed = 0
    with nullcontext() if json else GrowingTable(COLUMNS) as table:
        for comparison in compare_layouts(small, candidates, steps):
            failed += bool(comparison.verdict.problems)
            if table is None:
                typer.echo(dumps(comparison.to_json()))
            else:
                table.add(comparison.row())
    typer.echo(f"{len(candidates) - failed} equal, {failed} different", err=True)
    raise typer.Exit(1 if failed else 0)
