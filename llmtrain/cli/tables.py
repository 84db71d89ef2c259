"""Tables on stdout."""

import sys
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from rich.table import Table


def print_table(header: list[str], rows: list[list[str]]) -> None:
    """A table on a terminal; elsewhere columns separated by tabs, for `cut` and `awk`."""
    if not sys.stdout.isatty():
        for row in [header, *rows]:
            typer.echo("\t".join(row))
        return
    from rich.console import Console

    Console().print(build_table(header, rows))


def build_table(header: list[str], rows: list[list[str]]) -> "Table":
    """The table for a terminal."""
    from rich.box import SIMPLE
    from rich.table import Table
    from rich.text import Text

    table = Table(*header, box=SIMPLE, show_edge=False)
    for row in rows:
        table.add_row(*map(Text, row))
    return table
