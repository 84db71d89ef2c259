"""The ranks of one attempt on Slurm: each is forked by a task of the step (launch/nursery.py)."""

import sys
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, replace
from multiprocessing.connection import wait
from typing import Any

from launch.failure import Failure
from launch.nursery import failure_from, position_from
from launch.pulse import PulseBoard, Window
from launch.slurm_step import Task
from launch.stop import StopSignal
from launch.watch import POLL_SECONDS, RankNews
from llmtrain.config.schema import RunConfig
from llmtrain.errors import LaunchError

ANSWER_SECONDS = 10.0
"""How long a task may take to answer; it does nothing else."""

LOST = "its task has ended without a word: killed, or its machine is gone (what srun says of it stands above)"
SILENT = "its task does not answer"


class SlurmCrew:
    """See `Crew` in launch/watch.py. What the ranks say of where they are goes to the board."""

    def __init__(self, tasks: Sequence[Task], board: PulseBoard, stop: StopSignal) -> None:
        self._tasks = tasks
        self._board = board
        self._stop = stop
        self._told_to_stop = False
        self._looking: set[int] = set()
        self._heard: list[RankNews] = []
        self._answers: dict[int, dict[str, Any]] = {}

    def start(self, config: RunConfig, attempt: int, launch_id: str) -> None:
        """Have every rank forked. They meet at a store that the task of rank 0 serves, at a port of its own."""
        first = self._tasks[0]
        first.tell(do="listen", address=first.address)
        port = self._answer({0}, "listening").get(0, {}).get("port")
        if port is None:
            raise LaunchError(f"rank 0 on {first.host}: {SILENT}")
        meeting = {"host": first.address, "port": port, "serves_store": False}
        text, positions = config.model_dump_json(), self._board.positions()
        for rank, task in enumerate(self._tasks):
            place = replace(task.place, **meeting, attempt=attempt, launch_id=launch_id)
            task.tell(do="start", place=asdict(place), config=text, first_step=positions[rank].step)

    def end(self) -> bool:
        """End what is left of the ranks. Whether all tasks are there for another attempt."""
        everybody = range(len(self._tasks))
        for task in self._tasks:
            task.tell(do="end")
        return len(self._answer(everybody, "ended")) == len(everybody)

    def news(self, running: Collection[int]) -> list[RankNews]:
        """See `Crew`."""
        if self._stop.requested and not self._told_to_stop:
            self._told_to_stop = True
            for rank in running:
                self._tasks[rank].tell(do="stop")
        for rank in running:
            wanted = self._board.places_wanted(rank)
            if wanted != (rank in self._looking):
                self._looking ^= {rank}
                self._tasks[rank].tell(do="places", wanted=wanted)
        if not self._heard:
            self._listen(running, POLL_SECONDS)
        found, self._heard = self._heard, []
        return found

    def helpless(self, running: Collection[int]) -> Mapping[int, str]:
        """See `Crew`."""
        answers = self._ask("helpless", running)
        reasons = {rank: answers[rank]["text"] if rank in answers else SILENT for rank in running}
        return {rank: reason for rank, reason in reasons.items() if reason}

    def stacks(self, running: Collection[int]) -> dict[int, str]:
        """See `Crew`."""
        answers = self._ask("stacks", running)
        return {rank: answers[rank]["text"] if rank in answers else "" for rank in running}

    def host(self, rank: int) -> str:
        """See `Crew`."""
        return self._tasks[rank].host

    def _ask(self, what: str, ranks: Collection[int]) -> dict[int, dict[str, Any]]:
        for rank in ranks:
            self._tasks[rank].tell(do=what)
        return self._answer(ranks, what)

    def _answer(self, ranks: Collection[int], kind: str) -> dict[int, dict[str, Any]]:
        """What these ranks' tasks answer, by rank; those that do not, or are gone, are left out."""
        self._answers = {}
        deadline = time.monotonic() + ANSWER_SECONDS
        while time.monotonic() < deadline:
            answered = {rank for rank in ranks if self._answers.get(rank, {}).get("say") == kind}
            waiting = [rank for rank in ranks if rank not in answered and not self._tasks[rank].control.closed]
            if not waiting:
                break
            self._listen(waiting, POLL_SECONDS)
        return {rank: answer for rank, answer in self._answers.items() if answer["say"] == kind}

    def _listen(self, ranks: Collection[int], seconds: float) -> None:
        """Hear all that tasks have said, as soon as one of them has said something."""
        open_ones = {self._tasks[rank].control: rank for rank in ranks if not self._tasks[rank].control.closed}
        for control in wait(list(open_ones), seconds):
            rank = open_ones[control]  # pyright: ignore[reportArgumentType]  # a connection came back
            task = self._tasks[rank]
            while not task.control.closed and task.control.poll():
                self._take(rank, task.hear())

    def _take(self, rank: int, message: dict[str, Any] | None) -> None:
        """Note what a task has said; None means that it is gone."""
        host = self.host(rank)
        if message is None:
            # As with a process that was killed: it comes before what the others say of it.
            failure = Failure(rank, 1, LOST, LOST, killed=True, host=host, seconds=0.0)
            self._heard.append(RankNews(rank, failure, exit_code=1))
            return
        facts = {name: value for name, value in message.items() if name != "say"}
        match message["say"]:
            case "position":
                self._board.put(rank, position_from(facts))
            case "window":
                self._board.add_window(rank, Window(**facts))
            case "failure":
                self._heard.append(RankNews(rank, failure_from(facts, host)))
            case "exited":
                self._heard.append(RankNews(rank, exit_code=facts["code"]))
            case "output":
                sys.stdout.buffer.write(facts["text"].encode("utf-8", "surrogateescape"))
                sys.stdout.buffer.flush()
            case _:
                self._answers[rank] = message
