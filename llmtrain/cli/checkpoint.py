"""`llmtrain checkpoint`: what a run has saved, whether it is whole, and how two checkpoints differ."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmtrain.cli.tables import print_table
from llmtrain.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from llmtrain.checkpoint.manifest import Manifest
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
    rows = [_summary(path) for path in _checkpoint_folders(run)]
    if as_json:
        _print_json(rows)
        return
    header = ["step", "size", "tensors", "metric", "state", "folder"]
    cells = [
        [
            str(row["step"]),
            _size(row["size_bytes"]),
            str(row["num_tensors"]),
            "" if row["metric"] is None else f"{row['metric']:.6g}",
            "damaged" if row["problem"] else "ok",
            row["path"],
        ]
        for row in rows
    ]
    print_table(header, cells)


@app.command()
def inspect(checkpoint: CheckpointArgument, as_json: JsonOption = False) -> None:
    """What a checkpoint holds: step, size, parameters, tensors, and the layout and engine that it came from."""
    reader = _open(checkpoint)
    tensors = list(reader.tensors())
    padding = _padding(reader, tensors)
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
    results = []
    for path in _checkpoint_folders(folder):
        manifest, problems = _problems(path)
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
    rows = list(_differences(_open(first), _open(second)))
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


def _checkpoint_folders(path: Path) -> list[Path]:
    """The checkpoints that a path means, oldest first: itself, or those of a run. Raises ConfigError for none."""
    from llmtrain.checkpoint.folders import checkpoint_steps, folder_of_checkpoints, is_checkpoint, step_folder_name

    if not path.is_dir():
        raise ConfigError(f"{path}: is no folder. Give a run folder or a checkpoint folder.")
    if is_checkpoint(path):
        return [path]
    parent = folder_of_checkpoints(path)
    if parent is None:
        raise ConfigError(f"{path}: holds no checkpoint. Give a run folder with checkpoints/step-... in it.")
    return [parent / step_folder_name(step) for step in reversed(checkpoint_steps(parent))]


def _open(path: Path) -> "CheckpointReader":
    from llmtrain.checkpoint.reader import open_checkpoint

    return open_checkpoint(_checkpoint_folders(path)[-1])


def _problems(path: Path) -> tuple["Manifest | None", list[str]]:
    from llmtrain.checkpoint.manifest import load_manifest
    from llmtrain.checkpoint.reader import checkpoint_problems

    try:
        manifest = load_manifest(path)
        return manifest, checkpoint_problems(path, manifest, verify=True)
    except CheckpointError as error:
        return None, [str(error)]


def _summary(path: Path) -> dict[str, Any]:
    from llmtrain.checkpoint.folders import step_of_folder
    from llmtrain.checkpoint.reader import open_checkpoint

    row: dict[str, Any] = {"path": str(path), "step": step_of_folder(path.resolve().name)}
    try:
        reader = open_checkpoint(path, verify=False)
        num_tensors = len(list(reader.tensors()))
        metric = reader.about.get("metric")
        return {
            **row,
            "step": reader.step,
            "size_bytes": reader.size_bytes,
            "num_tensors": num_tensors,
            "metric": metric,
            "problem": None,
        }
    except CheckpointError as error:
        size_bytes = sum(entry.lstat().st_size for entry in path.iterdir())
        return {**row, "size_bytes": size_bytes, "num_tensors": 0, "metric": None, "problem": str(error)}


def _padding(reader: "CheckpointReader", tensors: "list[TensorInfo]") -> int:
    """Elements of the rows that pad the vocabulary: they lie in the tensors, and are no parameters of the model."""
    from llmtrain.checkpoint.origin import origin_of
    from llmtrain.config.parameter_shapes import VOCABULARY_TENSORS

    model = origin_of(reader.path, reader.state, reader.config_text, reader.about).section("model")
    vocab_size = model.get("vocab_size")
    if not isinstance(vocab_size, int):
        return 0
    padded = [tensor for tensor in tensors if tensor.kind == "master" and tensor.name in VOCABULARY_TENSORS]
    return sum(max(0, tensor.shape[0] - vocab_size) * tensor.num_elements // tensor.shape[0] for tensor in padded)


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


def _differences(first: "CheckpointReader", second: "CheckpointReader") -> Iterator[dict[str, Any]]:
    import torch

    from llmtrain.values.fragment import Box

    left = {(tensor.name, tensor.kind): tensor for tensor in first.tensors()}
    right = {(tensor.name, tensor.kind): tensor for tensor in second.tensors()}
    for name, kind in sorted(left.keys() | right.keys()):
        one, other = left.get((name, kind)), right.get((name, kind))
        row: dict[str, Any] = {"name": name, "kind": kind, "max_abs": None}
        if one is None or other is None:
            row["result"] = "only in A" if other is None else "only in B"
        elif (one.dtype, one.shape) != (other.dtype, other.shape):
            row["result"] = f"{one.dtype} {list(one.shape)} and {other.dtype} {list(other.shape)}"
        else:
            a, b = (reader.read(name, kind, Box.whole(one.shape)).reshape(-1) for reader in (first, second))
            if torch.equal(a.view(torch.uint8), b.view(torch.uint8)):
                row["result"] = "equal"
            else:
                row |= {"result": "different", "max_abs": (a.double() - b.double()).abs().max().item()}
        yield row


def _size(size_bytes: int) -> str:
    size = float(size_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} B" if unit == "B" else f"{size:.2f} {unit}"
        size /= 1000
    return f"{size:.2f} TB"


def _print_json(value: object) -> None:
    typer.echo(json.dumps(value, indent=1))
