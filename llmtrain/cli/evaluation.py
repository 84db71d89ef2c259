"""`llmtrain eval`: a trained model measured on tasks, of our own and of lm-eval."""

import json
import math
import re
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmtrain.cli.models.options import BaseFolderOption, BestOption, KernelKind, KernelsOption
from llmtrain.errors import ConfigError

if TYPE_CHECKING:
    from llmtrain.infer.evaluation.run import TaskResult

SECONDS_BETWEEN_LINES = 10.0

MoreArgument = Annotated[
    list[str] | None,
    typer.Argument(
        help="More tasks, as behind --tasks; and ranks that hold the model, such as parallel.tensor=2.",
        metavar="TASK... KEY=VALUE...",
    ),
]


class ProgressLines:
    """Says on stderr how far each task is, at its begin, its end and every few seconds."""

    def __init__(self) -> None:
        self._said_at = dict[str, float]()

    def __call__(self, task: str, done: int, total: int) -> None:
        now = time.monotonic()
        if done < total and now - self._said_at.get(task, -math.inf) < SECONDS_BETWEEN_LINES:
            return
        self._said_at[task] = now
        typer.echo(f"{task}: {done:,} of {total:,}", err=True)


def evaluate(
    model: Annotated[Path, typer.Argument(help="A run, a checkpoint, a Hugging Face or PEFT folder, FILE.gguf.")],
    more: MoreArgument = None,
    tasks: Annotated[
        list[str] | None, typer.Option(help="Files of tasks (.yaml), or names of lm-eval's tasks.", metavar="TASK...")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, max=10**9, help="First samples of each task; all without it.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="JSON lines, one per sample, written as it goes. Called again, it goes on.")
    ] = None,
    include_path: Annotated[Path | None, typer.Option(help="A folder with tasks of lm-eval's kind.")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="Instead of the one beside the model.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    best: BestOption = False,
    base: BaseFolderOption = None,
    kernels: KernelsOption = KernelKind.AUTO,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure a trained model on tasks: choices, cloze, perplexity, answers that match, questions and answers.

    A name that is no file is a task of lm-eval, which the extra `eval` brings.
    """
    keys = [word for word in more or [] if is_key(word)]
    names = [*(tasks or []), *(word for word in more or [] if not is_key(word))]
    if not names:
        raise ConfigError("--tasks: is required: files of tasks (.yaml), or names of lm-eval's tasks.")
    files = [Path(name) for name in names if is_file(name)]
    others = [name for name in names if not is_file(name)]
    if include_path is not None and not others:
        raise ConfigError(f"--include-path {include_path}: goes with names of lm-eval's tasks, and --tasks has none.")
    from launch.decoding import open_trained
    from llmtrain.checkpoint.find import best_checkpoint
    from llmtrain.config.reading.tasks import load_tasks
    from llmtrain.infer.evaluation.run import EvaluationOptions, TaskResult, evaluate_tasks, require_harness
    from llmtrain.infer.packed.choice import KernelChoice
    from llmtrain.infer.text_model import TextModel

    loaded, results = load_tasks(files), dict[str, TaskResult]()
    if others:
        require_harness()
    asked = EvaluationOptions(ProgressLines(), limit, out)
    how = KernelChoice(kernels.value, "reading")
    source = best_checkpoint(model) if best else model
    with saying_how_to_go_on(out), open_trained(source, keys, device, base=base, kernels=how) as trained:
        text_model = TextModel(trained, tokenizer)
        if loaded:
            results |= evaluate_tasks(text_model, loaded, asked)
        if others:
            with redirect_stdout(sys.stderr):  # what lm-eval prints is no answer of this command
                from llmtrain.infer.evaluation.harness import evaluate_harness

                results |= evaluate_harness(text_model, others, asked, include_path)
    if as_json:
        typer.echo(json.dumps({"model": str(model), "tasks": _told(results)}, indent=1, allow_nan=False))
        return
    from llmtrain.cli.tables import print_table

    print_table(["task", "samples", "metric", "value", "standard error"], _rows(results))


@contextmanager
def saying_how_to_go_on(out: Path | None) -> Iterator[None]:
    """Told to stop, say where the samples are that were measured."""
    try:
        yield
    except KeyboardInterrupt:
        if out is not None:
            typer.echo(f"what was measured is in {out}: the same command goes on from there", err=True)
        raise


def _told(results: Mapping[str, "TaskResult"]) -> dict[str, Any]:
    return {
        name: {
            "kind": result.kind,
            "samples": result.num_samples,
            # JSON has no infinity and no NaN.
            "metrics": {key: value if math.isfinite(value) else None for key, value in result.metrics.items()},
            "standard_errors": dict(result.errors),
        }
        for name, result in results.items()
    }


def _rows(results: Mapping[str, "TaskResult"]) -> list[list[str]]:
    return [
        [name, f"{result.num_samples:,}", metric, f"{value:.4f}", f"{error:.4f}" if error is not None else ""]
        for name, result in results.items()
        for metric, value in result.metrics.items()
        for error in [result.errors.get(metric)]
    ]


def is_file(name: str) -> bool:
    """True for what names a file of tasks."""
    return name.endswith((".yaml", ".yml")) or Path(name).is_file()


def is_key(word: str) -> bool:
    """True for what sets a key."""
    return re.match(r"[a-z_]+\.[a-z_.]+=", word) is not None and not is_file(word)
