"""The `llmtrain` command."""

from collections.abc import Sequence
from typing import NoReturn

from llmtrain.cli.interruption import hear_signals

__all__ = ["main"]


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Run the command with the given arguments, and end the process with its exit code.

    Without arguments it is the process's own command line that is run, and the process answers signals.
    """
    if args is None:
        hear_signals()
    from llmtrain.cli.app import main as run

    run(args)
