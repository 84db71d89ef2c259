"""A rank's own log in the run folder, appended over attempts: `logs/rank-00003.log`."""

import os
import socket
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from launch.rank.place import Rank
from llmtrain.files import open_log
from llmtrain.messages import show_messages
from llmtrain.runs.rank_logs import LOGS, log_path


def stacks_path(run_dir: Path) -> Path:
    """Where it is kept what hung ranks were doing."""
    return run_dir / LOGS / "stacks.txt"


@contextmanager
def rank_log(run_dir: Path, place: Rank) -> Iterator[None]:
    """Append what this process prints to its log, headed by a line about the attempt; an error that leaves is kept too.

    Rank 0, alone or not, goes on printing where it did: its console writes plain lines to the log as well.
    """
    path = log_path(run_dir, place.rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    with open_log(path) as log:
        where = f"on {socket.gethostname()}, process {os.getpid()}"
        log.write(f"=== {now} rank {place.rank} of {place.world_size} {where}\n")
        log.flush()
        before = _redirect(log.fileno()) if place.rank > 0 else ()
        if before:
            show_messages()  # all of them: this log is its own
        try:
            yield
        except BaseException:
            log.write(traceback.format_exc())
            raise
        finally:
            for number, old in before:
                _flush()
                os.dup2(old, number)
                os.close(old)


def _redirect(target: int) -> tuple[tuple[int, int], ...]:
    """Let stdout and stderr of this process, below Python too, go to a file; returns what they were."""
    _flush()
    before = tuple((number, os.dup(number)) for number in (1, 2))
    for number, _ in before:
        os.dup2(target, number)
    return before


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
