"""Where a process spends its time: its stacks, looked at many times a second."""

import faulthandler
import re
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from launch.rank.heartbeat import Work

LOOK_SECONDS = 0.02
"""Time between two looks."""

STANDSTILL = "nowhere: its process was stopped, or got no processor"

STANDSTILL_SECONDS = 0.08
"""A look that is later than this, no processor having been used, has seen a standstill."""

_THREAD = re.compile(r"^(?:Current thread|Thread) 0x([0-9a-f]+)", re.MULTILINE)
_FRAME = re.compile(r'^  File "([^"]*)", line (\d+) in (\S+)', re.MULTILINE)
_THREAD_FILES = re.compile(r"/threading\.py$")
_NO_PLACE = re.compile(r"/torch/|/threading\.py$|/concurrent/futures/")

Frame = tuple[str, str, str]
"""File, line and function."""


class Looks:
    """Looks at the main thread from now on, and counts in which line it is, by phase.

    Stacks are written by faulthandler, which reads them as they are: Python's own frames of a thread that runs on
    (sys._current_frames) have crashed CPython 3.11.
    """

    def __init__(self, phase: Callable[[], Work | None], waiting_file: str, preparing: str) -> None:
        """`phase` says in which one the main thread is at work; None: in none. It waits, which does not count, where
        its innermost frame is in `waiting_file`. Where it waits for another thread, that is taken whose name begins
        with `preparing`. Made in the main thread."""
        self._phase, self._waiting_file, self._preparing = phase, waiting_file, preparing
        self._main = threading.get_ident()
        self._counts: dict[Work, Counter[str]] = {}
        self._lock = threading.Lock()
        self._ended = threading.Event()
        threading.Thread(target=self._look_often, daemon=True, name="looks").start()

    def places(self) -> dict[Work, str]:
        """The place where it was most often since the last call, by phase: `function (file:line)`."""
        with self._lock:
            counts, self._counts = self._counts, {}
        return {phase: places.most_common(1)[0][0] for phase, places in counts.items()}

    def end(self) -> None:
        """Look no more."""
        self._ended.set()

    def _look_often(self) -> None:
        with tempfile.TemporaryFile() as file:
            now, ran = time.monotonic(), time.process_time()
            while not self._ended.wait(LOOK_SECONDS):
                before, ran_before = now, ran
                now, ran = time.monotonic(), time.process_time()
                file.seek(0)
                file.truncate()
                phase = self._phase()
                faulthandler.dump_traceback(file)
                file.seek(0)
                if phase is None:
                    continue
                stopped = now - before > STANDSTILL_SECONDS and ran - ran_before < (now - before) / 2
                place = STANDSTILL if stopped else self._place(file.read().decode("utf-8", "replace"))
                if place:
                    looks = round((now - before) / LOOK_SECONDS) if stopped else 1
                    with self._lock:
                        self._counts.setdefault(phase, Counter())[place] += looks

    def _place(self, dump: str) -> str:
        """Where the main thread is; empty where it waits."""
        stacks = stacks_of(dump)
        frames = stacks.get(self._main, [])
        if not frames or frames[0][0] == self._waiting_file:
            return ""
        if _THREAD_FILES.search(frames[0][0]):
            names = {thread.ident: thread.name for thread in threading.enumerate()}
            others = [stack for ident, stack in stacks.items() if names.get(ident, "").startswith(self._preparing)]
            frames = next((stack for stack in others if stack), frames)
        file, line, function = next((frame for frame in frames if not _NO_PLACE.search(frame[0])), frames[0])
        return f"{function} ({Path(file).name}:{line})"


def stacks_of(dump: str) -> dict[int, list[Frame]]:
    """The frames of each thread of a dump by faulthandler, innermost first, by the thread's ident."""
    _, *parts = _THREAD.split(dump)
    return {int(ident, 16): _FRAME.findall(text) for ident, text in zip(parts[::2], parts[1::2], strict=True)}
