"""Runs as they are seen from outside, over and over."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from llmtrain.errors import DataError
from llmtrain.report.run_view import RunView, look

WATCH_SECONDS = 2.0


def iter_views(folders: Sequence[Path], again: bool) -> Iterator[list[RunView]]:
    """What is seen of the runs, over and over. A process that is gone once may be one that is being replaced."""
    before: set[str] = set()
    while True:
        views = [_look(folder) for folder in folders]
        dead = {view.path for view in views if view.state == "dead"}
        if again and dead - before:
            before = dead
            time.sleep(WATCH_SECONDS)
            continue
        yield views
        if not again:
            return
        before = dead
        time.sleep(WATCH_SECONDS)


def _look(folder: Path) -> RunView:
    try:
        return look(folder)
    except DataError as error:
        return RunView(folder.resolve().name, str(folder), "damaged", cause=str(error))
