"""Where messages go: the packages log by Python's `logging`, and a command shows that on stderr in plain words.

A program that uses the packages as a library sees, redirects or silences the loggers in LOGGERS as any other's.
"""

import logging
import sys

from llmtrain.config.reading.credentials import text_without_credentials

LOGGERS = ("llmtrain", "launch", "data_pipelines")


def show_messages(rank: int = 0) -> None:
    """Write this process's messages to stderr, in place of an earlier call's: all of rank 0, warnings of the others."""
    handler = _Stderr()
    handler.setFormatter(_PlainWords())
    handler.addFilter(lambda record: rank == 0 or record.levelno >= logging.WARNING)
    for name in LOGGERS:
        logger = logging.getLogger(name)
        logger.setLevel(logging.INFO)
        # A guest may give the root logger a handler of its own: nothing is to be said twice.
        logger.propagate = False
        logger.handlers = [handler]


class _Stderr(logging.StreamHandler):
    """Writes to what is sys.stderr at the time: a progress bar puts itself there, to stay below what is written."""

    @property
    def stream(self):  # the type is the base class's
        return sys.stderr

    @stream.setter
    def stream(self, stream: object) -> None:
        """The base class sets what it was made with."""


class _PlainWords(logging.Formatter):
    """The message; a warning says that it is one. No URL keeps its credentials."""

    def format(self, record: logging.LogRecord) -> str:
        mark = "warning: " if record.levelno == logging.WARNING else ""
        return mark + text_without_credentials(super().format(record))
