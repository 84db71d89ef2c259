"""`llmtrain checkpoint`: what a run has saved, whether it is whole, and how two checkpoints differ."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmtrain.cli.tables import print_table
from llmtrain.errors import CheckpointError

if TYPE_CHECKING:
    from llmtrain.checkpoint.reader import CheckpointReader, TensorInfo

app = typer.Typer(help="List, inspect, verify and compare checkpoints.", no_args_is_help=True)

RunArgument = Annotated[Path, typer.Argument(help="A run folder.", metavar="RUN")]
CheckpointArgument = Annotated[
    Path, typer.Argument(help="A checkpoint folder, or a run folder: its newest checkpoint.", metavar="CHECKPOINT")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command("list")
def list_checkpoints(run: RunArgument, as_json: JsonOption = False) -> None:
    """The checkpoints of a run, oldest first. Reads manifests only; `verify` reads everything."""
    from llmtrain.checkpoint.find import checkpoint_folders
    from llmtrain.checkpoint.inspection import summary_of

    rows = [asdict(summary_of(path)) for path in checkpoint_folders(run)]
    if as_json:
        _print_json(rows)
        return
    header = ["step", "size", "tensors", "metric", "state", "folder"]
    cells = [
        [
            str(row["step"]),
            _size(row["size_bytes"]),
            str(row["num_tensors"]),
            "" if row["metric"] is None else f"{row['metric_name']} {row['metric']:.6g}",
            "damaged" if row["problem"] else "ok",
            row["path"],
        ]
        for row in rows
    ]
    print_table(header, cells)


@app.command()
def inspect(checkpoint: CheckpointArgument, as_json: JsonOption = False) -> None:
    """What a checkpoint holds: step, size, parameters, tensors, and the layout and engine that it came from."""
    from llmtrain.checkpoint.find import open_newest
    from llmtrain.checkpoint.inspection import num_padding_elements

    reader = open_newest(checkpoint)
    tensors = list(reader.tensors())
    padding = num_padding_elements(reader, tensors)
    num_parameters = sum(tensor.num_elements for tensor in tensors if tensor.kind == "master") - padding
    if as_json:
        _print_json(
            {
                **_facts(reader, num_parameters, padding),
                "state": reader.state,
                "tensors": [
                    {
                        "name": tensor.name,
                        "kind": tensor.kind,
                        "dtype": tensor.dtype,
                        "shape": tensor.shape,
                        "num_fragments": tensor.num_fragments,
                    }
                    for tensor in tensors
                ],
            }
        )
        return
    facts = _facts(reader, num_parameters, padding)
    facts["size"] = _size(facts.pop("size_bytes"))
    for key, value in facts.items():
        text = value if isinstance(value, str) else f"{value:,}" if isinstance(value, int) else json.dumps(value)
        typer.echo(f"{key.replace('_', ' '):<12} {text}")
    typer.echo()
    print_table(["tensor", "dtype", "shape", "kinds"], list(_tensor_rows(tensors)))


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(help="A checkpoint folder, or a run folder: all of its checkpoints.")],
    as_json: JsonOption = False,
) -> None:
    """Hash every file and check every header. Lists every problem; exit code 3 when there is one."""
    from llmtrain.checkpoint.find import checkpoint_folders
    from llmtrain.checkpoint.inspection import verified

    results = []
    for path in checkpoint_folders(folder):
        manifest, problems = verified(path)
        files = manifest.files.values() if manifest else ()
        size_bytes = sum(entry.size_bytes for entry in files)
        results.append({"path": str(path), "num_files": len(files), "size_bytes": size_bytes, "problems": problems})
        if not as_json and not problems:
            typer.echo(f"{path}: ok, {len(files)} files, {_size(size_bytes)}: sha256, headers and names checked")
    if as_json:
        _print_json(results)
    found = [problem for result in results for problem in result["problems"]]
    if found:
        num_damaged = sum(bool(result["problems"]) for result in results)
        raise CheckpointError(
            "\n".join(found) + f"\n{num_damaged} of {len(results)} checkpoints are damaged. Do not use them: copy them "
            "again from where they came from, or remove them; a run resumes from its newest whole checkpoint."
        )


@app.command()
def diff(
    first: Annotated[Path, typer.Argument(help="A checkpoint, or a run: its newest.", metavar="A")],
    second: Annotated[Path, typer.Argument(help="Another one.", metavar="B")],
    as_json: JsonOption = False,
) -> None:
    """Compare two checkpoints tensor by tensor, bit by bit, whatever their layouts. Exit code 1 when they differ."""
    from llmtrain.checkpoint.find import open_newest
    from llmtrain.checkpoint.inspection import tensor_differences

    rows = [asdict(found) for found in tensor_differences(open_newest(first), open_newest(second))]
    different = [row for row in rows if row["result"] != "equal"]
    if as_json:
        _print_json(rows)
    else:
        if different:
            header = ["tensor", "kind", "result", "max abs difference"]
            print_table(
                header,
                [
                    [row["name"], row["kind"], row["result"], "" if row["max_abs"] is None else f"{row['max_abs']:.6g}"]
                    for row in different
                ],
            )
        typer.echo(f"{len(rows) - len(different)} of {len(rows)} tensors are equal bit by bit")
    if different:
        raise typer.Exit(1)


def _facts(reader: "CheckpointReader", num_parameters: int, padding: int) -> dict[str, Any]:
    return {
        "path": str(reader.path),
        "step": reader.step,
        "parameters": num_parameters,
        "padding": padding,
        "size_bytes": reader.size_bytes,
        "files": reader.num_files,
        "about": reader.about,
        "created_by": reader.created_by,
    }


def _tensor_rows(tensors: "list[TensorInfo]") -> Iterator[list[str]]:
    """One row per name, with the kinds that share its type and shape together."""
    grouped: dict[tuple[str, str, str], list[str]] = {}
    for tensor in tensors:
        grouped.setdefault((tensor.name, tensor.dtype, str(list(tensor.shape))), []).append(tensor.kind)
    for key, kinds in grouped.items():
        yield [*key, ", ".join(kinds)]


def _size(size_bytes: int) -> str:
    size = float(size_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} B" if unit == "B" else f"{size:.2f} {unit}"
        size /= 1000
    return f"{size:.2f} TB"


def _print_json(value: object) -> None:
    typer.echo(json.dumps(value, indent=1))
