"""`llmtrain doctor`: what can be done on this machine, why not the rest, and what would mend it."""

import json
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from llmtrain.checks.doctor.finding import Finding

WIDTH = 110
MARKS = {"ok": ("ok", "green"), "limited": ("!", "yellow"), "missing": ("-", "yellow"), "broken": ("x", "red")}
"""What stands before a finding, and its colour."""


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
    from llmtrain.checks.doctor.finding import can_train

    findings = examine(output_dir, lambda line: typer.echo(line, err=True))
    possible = can_train(findings)
    if as_json:
        facts = {"can_train": possible, "findings": [asdict(finding) for finding in findings]}
        typer.echo(json.dumps(facts, indent=1))
    else:
        _print(findings)
        typer.echo(_verdict(findings, possible))
    raise typer.Exit(0 if possible else 1)


def _print(findings: list["Finding"]) -> None:
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
    from llmtrain.checks.doctor.finding import Finding

    right = [f for f in findings if f.section == "packages" and f.state == "ok" and f.name != "Python"]
    line = Finding("packages", "packages", "ok", ", ".join(f"{f.name} {f.text}" for f in right))
    rest = [finding for finding in findings if finding not in right]
    first = next((number for number, finding in enumerate(rest) if finding.name != "Python"), len(rest))
    return [*rest[:first], *([line] if right else []), *rest[first:]]


def _verdict(findings: list["Finding"], possible: bool) -> str:
    broken = [finding.name for finding in findings if finding.state == "broken"]
    also = f" Broken: {', '.join(broken)}." if broken else ""
    return f"\nTraining is possible here.{also}" if possible else f"\nTraining is not possible here.{also}"
