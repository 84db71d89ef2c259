"""Ranks that are slower than the others: who they are, and where they spend their time."""

import logging
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from statistics import median

from launch.rank.signals import NUM_WINDOWS, WINDOW_STEPS, WORK, HeartbeatBoard, Work, WorkWindow
from llmtrain.config.schema import RunConfig
from llmtrain.parallel.layout import plan_layout
from llmtrain.runs.audit import record

_logger = logging.getLogger(__name__)

SLOW_WINDOWS = 3
"""A rank is slow after so many slow windows in a row."""

SLOW_SECONDS = 1.0
"""... in which it has worked for so long: where steps are short, ranks that share processors are slow in turns."""

LEAST_SECONDS = 0.001
"""A difference below this in a step does not count."""

USUAL_WINDOWS = 20
LEAST_USUAL_WINDOWS = 2
"""A rank's usual work is the median of its last windows in which it was not slow, once there are a few."""


@dataclass(frozen=True)
class Straggler:
    """A rank that works longer than it should, up to `step`.

    `score` is the time that it should need over the time that it needs. Most of the excess is in `phase`, and most of
    that phase's work in `place`.
    """

    rank: int
    score: float
    phase: Work
    place: str
    step: int


class Judge:
    """Finds the ranks that are slow, window by window. Pure.

    A rank should need what its peers need, who do the same work: their median. One that has no peers should need what
    it needed before; where the others need more than before as well, so much more.
    """

    def __init__(self, peers: Sequence[Sequence[int]], limit: float) -> None:
        """`peers` are the groups of ranks that do the same work. A score of `limit` or less is slow."""
        self._peers = {rank: [peer for peer in group if peer != rank] for group in peers for rank in group}
        self._limit = limit
        self._usual: dict[int, deque[WorkWindow]] = {rank: deque(maxlen=USUAL_WINDOWS) for rank in self._peers}
        # Slow windows in a row, and the work in them, in seconds.
        self._slow: dict[int, tuple[int, float]] = dict.fromkeys(self._peers, (0, 0.0))
        self._named: set[int] = set()

    def judge(self, windows: Sequence[WorkWindow]) -> list[Straggler]:
        """The ranks that have become slow with these windows, by rank. A rank is named again once it has recovered."""
        found = []
        all_wanted = [self._wanted(rank, windows) for rank in range(len(windows))]
        for rank, (window, wanted) in enumerate(zip(windows, all_wanted, strict=True)):
            score = self._score(window, wanted)
            if wanted is None or score is None or score > self._limit:
                self._slow[rank] = (0, 0.0)
                self._named.discard(rank)
                self._usual[rank].append(window)
                continue
            count, seconds = self._slow[rank]
            count, seconds = self._slow[rank] = (count + 1, seconds + _total(window))
            if rank not in self._named and count >= SLOW_WINDOWS and seconds >= SLOW_SECONDS:
                self._named.add(rank)
                too_much: dict[Work, float] = {phase: window.work[phase] - wanted[phase] for phase in WORK}
                phase = max(WORK, key=too_much.__getitem__)
                found.append(Straggler(rank, score, phase, window.places[phase], window.step))
        return found

    def suspects(self) -> set[int]:
        """The ranks that were slow in the last window."""
        return {rank for rank, (count, _) in self._slow.items() if count}

    def _wanted(self, rank: int, windows: Sequence[WorkWindow]) -> dict[Work, float] | None:
        """The work that a rank should need in each phase; None where that is not known."""
        peers = self._peers[rank]
        if peers:
            return {phase: median(windows[peer].work[phase] for peer in peers) for phase in WORK}
        if len(self._usual[rank]) < LEAST_USUAL_WINDOWS:
            return None
        # How many times as long as usual the others work: then this one may as well.
        usual = {other: median(map(_total, self._usual[other])) for other in self._peers if self._usual[other]}
        changes = [
            _total(windows[other]) / usual[other] if usual.get(other) else 1.0 for other in self._peers if other != rank
        ]
        change = max(1.0, median(changes)) if changes else 1.0
        return {phase: change * median(window.work[phase] for window in self._usual[rank]) for phase in WORK}

    def _score(self, window: WorkWindow, wanted: dict[Work, float] | None) -> float | None:
        """The work that a rank should need over the work that it needs; None where the difference says nothing."""
        if wanted is None:
            return None
        work, should = _total(window), sum(wanted.values())
        return should / work if work - should > LEAST_SECONDS * WINDOW_STEPS else None


def _total(window: WorkWindow) -> float:
    return sum(window.work.values())


class Stragglers:
    """Tells of the slow ranks of one attempt, at the terminal and in the run's audit log."""

    def __init__(self, config: RunConfig, board: HeartbeatBoard, host: Callable[[int], str]) -> None:
        """`host` names the machine of a rank."""
        self._host = host
        self._num_ranks = config.launch.num_workers
        layout = plan_layout(config.parallel, self._num_ranks)
        # Ranks of one pipeline stage have the same layers.
        self._judge = Judge(list(layout.groups("tensor", "context", "data")), config.observe.straggler_score)
        self._run_dir = config.run_dir
        self._board = board
        self._next = 0

    def look(self) -> None:
        """Judge the windows that ranks have added since the last call."""
        end = self._board.num_windows()
        for number in range(max(self._next, end - NUM_WINDOWS), end):
            for straggler in self._judge.judge(self._board.windows(number)):
                self._tell(straggler)
        self._next = end
        for rank in range(self._num_ranks):
            self._board.want_places(rank, rank in self._judge.suspects())

    def _tell(self, straggler: Straggler) -> None:
        host = self._host(straggler.rank)
        where = f", most of it in {straggler.place}" if straggler.place else ""
        _logger.info(
            f"slow: rank {straggler.rank} on {host}: what it does should take {straggler.score:.0%} of the time that "
            f"it took up to step {straggler.step}; it loses it in section {straggler.phase}{where}"
        )
        facts = {"score": round(straggler.score, 3), "section": straggler.phase, "place": straggler.place}
        with suppress(OSError):  # a disk that is full must not end a run that goes on
            record(self._run_dir, "straggler", rank=straggler.rank, host=host, step=straggler.step, **facts)
