"""`llmtrain parity`: does every layout compute the same numbers?"""

from pathlib import Path
from typing import Annotated

import typer


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
