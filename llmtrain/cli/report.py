"""`llmtrain report`: one HTML page about one run or several."""

from pathlib import Path
from typing import Annotated

import typer


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
