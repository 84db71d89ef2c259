"""A tracker that lives in a thread of its own, so that neither its start nor its rows hold up training."""

import threading
from collections.abc import Callable
from queue import SimpleQueue

from llmtrain.observe.tracker import Tracker
from llmtrain.values.row import Row

GATHER_SECONDS = 0.5
"""Rows are handed on in batches: waking the thread for each row would cost training more than the row itself."""

FLUSH_SECONDS = 1.0
CLOSE_SECONDS = 30.0


class BackgroundTracker:
    """Builds a tracker in a thread and hands it each row there.

    Whatever goes wrong in it is said once through `warn`; the rows after that are dropped. `flush` waits at most
    FLUSH_SECONDS and `close` at most `close_seconds` (CLOSE_SECONDS): training is worth more than a chart.
    """

    def __init__(
        self,
        label: str,
        build: Callable[[], Tracker],
        warn: Callable[[str], None],
        close_seconds: float | None = None,
    ) -> None:
        self._label = label
        self._build = build
        self._warn = warn
        self._close_seconds = close_seconds
        self._jobs: SimpleQueue[Callable[[Tracker], None] | None] = SimpleQueue()
        self._wake = threading.Event()
        self._failed = False
        self._thread = threading.Thread(target=self._work, name=f"tracker {label}", daemon=True)
        self._thread.start()

    def log(self, row: Row) -> None:
        if not self._failed:
            self._jobs.put(lambda tracker: tracker.log(row))

    def flush(self) -> None:
        drained = threading.Event()

        def drain(tracker: Tracker) -> None:
            tracker.flush()
            drained.set()

        if not self._failed:
            self._jobs.put(drain)
            self._wake.set()
            drained.wait(FLUSH_SECONDS)

    def close(self, status: str) -> None:
        self._jobs.put(lambda tracker: tracker.close(status))
        self._jobs.put(None)
        self._wake.set()
        seconds = self._close_seconds or CLOSE_SECONDS
        self._thread.join(seconds)
        if self._thread.is_alive():
            self._warn(f"{self._label} did not finish within {seconds:.0f} s; its last rows may be missing there")

    def _work(self) -> None:
        try:
            tracker = self._build()
            while (job := self._next_job()) is not None:
                job(tracker)
        except Exception as error:
            self._failed = True
            reason = str(error) or type(error).__name__
            self._warn(f"{self._label} is off from here on ({reason}); metrics.jsonl has everything")

    def _next_job(self) -> Callable[[Tracker], None] | None:
        if self._jobs.empty():
            self._wake.wait(GATHER_SECONDS)
            self._wake.clear()
        return self._jobs.get()
