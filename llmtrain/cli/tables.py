"""Tables on stdout: drawn by rich on a terminal, columns separated by tabs elsewhere, for `cut` and `awk`."""

import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Self

import typer

if TYPE_CHECKING:
    from rich.live import Live
    from rich.table import Table

LONGEST_LINE = 1000
"""Lines are never broken: a program that reads columns could not put them together again."""


def print_table(header: list[str], rows: list[list[str]]) -> None:
    """A table that is known as a whole."""
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


class GrowingTable:
    """A table whose rows come one by one, seconds or minutes apart; each is shown at once."""

    def __init__(self, header: Sequence[str]) -> None:
        self._header = header
        self._table: Table | None = None
        self._live: Live | None = None

    def __enter__(self) -> Self:
        if not sys.stdout.isatty():
            typer.echo("\t".join(self._header))
            return self
        from rich.console import Console
        from rich.live import Live

        # What is printed meanwhile, to stderr too, is shown above the table.
        self._table = build_table(list(self._header), [])
        self._live = Live(self._table, console=Console(), auto_refresh=False, vertical_overflow="visible")
        self._live.start(refresh=True)
        return self

    def add(self, row: Sequence[str]) -> None:
        """Show another row."""
        if self._table is None or self._live is None:
            typer.echo("\t".join(row))
            sys.stdout.flush()
            return
        from rich.text import Text

        self._table.add_row(*map(Text, row))
        self._live.refresh()

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()


def aligned(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns under each other as plain text, whatever it is printed to."""
    from io import StringIO

    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*header, box=None, padding=(0, 1), pad_edge=False)
    for row in rows:
        table.add_row(*map(Text, row))
    page = StringIO()
    Console(file=page, color_system=None, width=LONGEST_LINE).print(table)
    return "\n".join(line.rstrip() for line in page.getvalue().splitlines())
