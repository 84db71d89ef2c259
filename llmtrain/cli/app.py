"""The frame of the command: its verbs, how they are found, and how an error reaches the user.

A verb's module is imported when the verb is called, not before, so that `--help` stays fast and a module that
cannot be imported harms only its own verbs. Verb modules import only light things at their top.
"""

import io
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

from llmtrain.cli import raising
from llmtrain.errors import EXIT_TOLD_TWICE, ConfigError, LlmtrainError, PathError
from llmtrain.messages import show_messages


@dataclass(frozen=True)
class Verb:
    """The place of a verb's function, or of its group of verbs, and the line about it in `--help`."""

    module: str
    attribute: str
    summary: str
    panel: str


TRAINING, WATCHING, DATA, RESULTS = "Training", "Watching", "Data", "Results"

VERBS = {
    "train": Verb("llmtrain.cli.train", "train", "Train a model, or go on where the run stopped.", TRAINING),
    "submit": Verb("llmtrain.cli.submit", "submit", "Hand a run or a data pipeline over to Ray or Slurm.", TRAINING),
    "parity": Verb("llmtrain.cli.checks", "parity", "Compare layouts and engines with one process.", TRAINING),
    "drill": Verb("llmtrain.cli.checks", "drill", "Inject faults into short runs and see what follows.", TRAINING),
    "schema": Verb("llmtrain.cli.train", "schema", "Print the JSON schema of run files, for editors.", TRAINING),
    "doctor": Verb("llmtrain.cli.checks", "doctor", "Say what this machine can do, and why not more.", TRAINING),
    "data": Verb("llmtrain.cli.data", "app", "Make, look at and check data sets.", DATA),
    "checkpoint": Verb("llmtrain.cli.checkpoint", "app", "List, inspect, verify and compare checkpoints.", RESULTS),
    "status": Verb("llmtrain.cli.watching", "status", "Say how far runs are, and what is to be done.", WATCHING),
    "logs": Verb("llmtrain.cli.watching", "logs", "Print and follow the logs of a run's ranks.", WATCHING),
    "report": Verb("llmtrain.cli.watching", "report", "Write one HTML page about one run or several.", WATCHING),
    "generate": Verb("llmtrain.cli.generating", "generate", "Continue a text with a trained model.", RESULTS),
    "serve": Verb("llmtrain.cli.serving", "serve", "Serve a model as OpenAI's clients expect it.", RESULTS),
    "eval": Verb("llmtrain.cli.evaluation", "evaluate", "Measure a trained model on tasks.", RESULTS),
    "export": Verb("llmtrain.cli.models.exporting", "export", "Write a trained model for other programs.", RESULTS),
    "compress": Verb("llmtrain.cli.models.compressing", "compress", "Quantize a trained model.", RESULTS),
    "import": Verb("llmtrain.cli.models.importing", "import_", "Read a model of other programs.", RESULTS),
}
"""Every verb of the command. The summary stands here too, so that `--help` need not import the module."""


class Verbs(TyperGroup):
    """The root of the command: lists verbs from the table, loads one when it is called, and reports errors."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        # What help, completion and "did you mean" show of a verb: its name and summary, nothing imported.
        self.commands = {
            name: TyperCommand(name, help=verb.summary, rich_help_panel=verb.panel) for name, verb in VERBS.items()
        }

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The verb itself, in place of what the table says of it."""
        name, _, rest = super().resolve_command(ctx, args)
        verb = load_verb(str(name))
        refuse_keys_as_options(verb, rest)
        return name, verb, rest

    def invoke(self, ctx: Any) -> Any:
        """Run a verb. An error that a user can mend becomes a message and its exit code, without a traceback."""
        try:
            with raising():
                return super().invoke(ctx)
        except typer.BadParameter as error:
            # typer checks choices with pydantic, which puts this before a message that is whole without it.
            error.message = error.message.removeprefix("Value error, ")
            raise
        except LlmtrainError as error:
            if wants_traceback():
                raise
            report_error(error)
            raise typer.Exit(error.exit_code) from None
        except (OSError, RuntimeError) as error:
            # Paths that users name are opened in many places; what the system says of them is for users to mend.
            fault = PathError.of(error if isinstance(error, OSError) else error.__context__)
            if fault is None or wants_traceback():
                raise
            report_error(fault)
            raise typer.Exit(fault.exit_code) from None
        except KeyboardInterrupt:
            if wants_traceback():
                raise
            typer.echo("interrupted", err=True)
            raise typer.Exit(EXIT_TOLD_TWICE) from None


def load_verb(name: str) -> Any:
    """Import a verb's module and make its command."""
    verb = VERBS[name]
    found = getattr(import_module(verb.module), verb.attribute)
    if isinstance(found, typer.Typer):
        group = typer.main.get_group(found)
        group.name = name
        return group
    single = typer.Typer(add_completion=False)
    single.command(name)(found)
    return typer.main.get_command(single)


def refuse_keys_as_options(verb: Any, arguments: Sequence[str]) -> None:
    """Raise ConfigError for an unknown option that is a key of the configuration, where the verb takes KEY=VALUE."""
    options = {"--help", *(option for parameter in verb.params for option in parameter.opts)}
    if not any(parameter.name == "overrides" for parameter in verb.params):
        return
    for number, argument in enumerate(arguments):
        option, _, value = argument.partition("=")
        if option == "--":
            return
        if not option.startswith("--") or option in options:
            continue

        from llmtrain.config.reading.rendering import shown
        from llmtrain.config.reading.suggestions import all_keys, suggested_keys

        word = option.removeprefix("--").replace("-", "_")
        keys = [word] if word in all_keys() else suggested_keys(word.split("."))
        if keys:
            following = [*arguments[number + 1 : number + 2], "VALUE"][0]
            value = value or ("VALUE" if following.startswith("-") else following)
            raise ConfigError(f"no such option: {option}. Keys have no dashes: write {keys[0]}={shown(word, value)}.")


def wants_traceback() -> bool:
    """LLMTRAIN_TRACEBACK=1 shows where an error was raised, for whoever looks for a defect."""
    return os.environ.get("LLMTRAIN_TRACEBACK", "") not in ("", "0")


def report_error(error: LlmtrainError) -> None:
    """Write an error to stderr: every problem of a configuration on a line of its own, notes at the end.

    Whatever a library or a rule has put into the text, no URL keeps its credentials.
    """
    from llmtrain.config.reading.credentials import text_without_credentials

    coloured = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
    mark = typer.style("error:", fg="red", bold=True) if coloured else "error:"
    lines = [str(problem) for problem in error.problems] if isinstance(error, ConfigError) else []
    for line in lines or [str(error)]:
        typer.echo(f"{mark} {text_without_credentials(line)}", err=True)
    for note in getattr(error, "__notes__", ()):
        typer.echo(text_without_credentials(note), err=True)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"llmtrain {version('llmtrain')}")
        raise typer.Exit


app = typer.Typer(
    cls=Verbs,
    name="llmtrain",
    help="Train transformers at scale, with the same numbers in every layout.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    pass


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Run the command with the given arguments, or the process's, and end the process with its exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Names of files may hold bytes, and texts characters, that the terminal's encoding does not have.
        sys.stdout.reconfigure(errors="backslashreplace")
    show_messages()
    typer.main.get_command(app).main(args=args, prog_name="llmtrain")
    sys.exit(0)
