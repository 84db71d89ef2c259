"""The ranks of one attempt, each forked by an agent (launch/forking/agent.py) on some machine.

A rank set for `launch.supervision.attempt`.
"""

import sys
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, Protocol

from launch.forking.agent import failure_from, own_terminal, position_from
from launch.rank.failure import Failure
from launch.rank.place import Rank
from launch.rank.signals import HeartbeatBoard, StopSignal, WorkWindow
from launch.supervision.attempt import POLL_SECONDS, RankNews
from llmtrain.config.schema import RunConfig
from llmtrain.errors import LaunchError

ANSWER_SECONDS = 5.0
"""Time for a living agent to answer: answering is all it does."""

START_SECONDS = 30.0
"""The same where an attempt depends on the answer: a machine on which everything starts may be slow."""

SILENT = "the process that forks it does not answer"

Message = dict[str, Any]


class RankAgents(Protocol):
    """An agent for each rank, and how they are reached."""

    def tell(self, rank: int, message: Message) -> None:
        """Send a message. An agent that is gone is noticed by listening."""
        ...

    def listen(self, seconds: float) -> Iterable[tuple[int, Message]]:
        """Their messages, as soon as there is one, or nothing after so many seconds.

        `{"say": "gone", "text": why}` is the last that is heard of one that is gone.
        """
        ...

    def host(self, rank: int) -> str:
        """The name of its machine."""
        ...

    def address(self, rank: int) -> str:
        """The address at which other machines reach its machine."""
        ...


class AgentRankSet:
    """See `launch.supervision.attempt.RankSet`. Output goes to this process's stderr; where ranks are, to the board."""

    def __init__(self, agents: RankAgents, places: Sequence[Rank], board: HeartbeatBoard, stop: StopSignal) -> None:
        """`places` are those of the ranks; where they meet is found by `start`."""
        self._agents, self._places, self._board, self._stop = agents, places, board, stop
        self._told_to_stop = False
        self._looking: set[int] = set()
        self._news: list[RankNews] = []
        self._answers: dict[int, Message] = {}
        self._gone: dict[int, str] = {}

    def start(self, config: RunConfig) -> None:
        """Have every rank forked. They meet at a store that the agent of rank 0 serves, at a port of its own.

        Raises LaunchError where that one does not answer.
        """
        address = self._agents.address(0)
        self._agents.tell(0, {"do": "listen", "address": address})
        listening = self._answer({0}, "listening", START_SECONDS)
        if not listening:
            raise LaunchError(self._gone.get(0, SILENT))  # told as the failure of rank 0
        text, positions, terminal = config.model_dump_json(), self._board.positions(), own_terminal()
        for rank, place in enumerate(self._places):
            met = asdict(replace(place, host=address, port=listening[0]["port"], serves_store=False))
            start = {"do": "start", "place": met, "config": text, "first_step": positions[rank].step}
            self._agents.tell(rank, {**start, "terminal": asdict(terminal) if terminal and rank == 0 else None})

    def news(self, running: Collection[int]) -> list[RankNews]:
        """See `RankSet`."""
        if self._stop.requested:
            self.save_and_end()
        self._pass_on_wishes()
        # What was heard while an answer was waited for comes first: nobody would say it again.
        if not self._news:
            self._listen(POLL_SECONDS)
        found, self._news = self._news, []
        return [news for news in found if news.rank in running]

    def save_and_end(self) -> None:
        """Tell all ranks to save and stop."""
        if not self._told_to_stop:
            self._told_to_stop = True
            self._tell(range(len(self._places)), {"do": "stop"})

    def helpless(self, running: Collection[int]) -> Mapping[int, str]:
        """See `RankSet`."""
        answers = self._ask("helpless", running)
        reasons = {rank: answers[rank]["text"] if rank in answers else self._gone.get(rank, SILENT) for rank in running}
        return {rank: reason for rank, reason in reasons.items() if reason}

    def stacks(self, running: Collection[int]) -> dict[int, str]:
        """See `RankSet`."""
        answers = self._ask("stacks", running)
        return {rank: answers[rank]["text"] if rank in answers else "" for rank in running}

    def host(self, rank: int) -> str:
        """See `RankSet`."""
        return self._agents.host(rank)

    def end(self) -> set[int]:
        """End what is left of the ranks. Returns those whose agent is gone, or does not answer."""
        everybody = set(range(len(self._places)))
        self._tell(everybody, {"do": "end"})
        return everybody - self._answer(everybody, "ended").keys()

    def _pass_on_wishes(self) -> None:
        """Tell the ranks of which it is wanted that they find out where they spend their time, and when no more."""
        wanted = {rank for rank in range(len(self._places)) if self._board.places_wanted(rank)}
        for rank in wanted ^ self._looking:
            self._agents.tell(rank, {"do": "places", "wanted": rank in wanted})
        self._looking = wanted

    def _tell(self, ranks: Collection[int], message: Message) -> None:
        for rank in set(ranks) - self._gone.keys():
            self._agents.tell(rank, message)

    def _ask(self, what: str, ranks: Collection[int]) -> dict[int, Message]:
        self._tell(ranks, {"do": what})
        return self._answer(ranks, what)

    def _answer(self, ranks: Collection[int], kind: str, seconds: float | None = None) -> dict[int, Message]:
        """The answers of these ranks' agents; those that do not answer, or are gone, are left out.

        Other messages that arrive meanwhile are taken note of as well: an agent's answer comes behind its news.
        """
        self._answers = {}
        deadline = time.monotonic() + (seconds or ANSWER_SECONDS)
        while set(ranks) - self._gone.keys() - self._answers.keys() and time.monotonic() < deadline:
            self._listen(POLL_SECONDS)
        return {rank: answer for rank, answer in self._answers.items() if answer["say"] == kind}

    def _listen(self, seconds: float) -> None:
        for rank, message in self._agents.listen(seconds):
            self._take(rank, message)

    def _take(self, rank: int, message: Message) -> None:
        """Note what an agent has said."""
        facts = {name: value for name, value in message.items() if name != "say"}
        match message["say"]:
            case "output":
                sys.stderr.buffer.write(facts["text"].encode("utf-8", "surrogateescape"))
                sys.stderr.flush()
            case "position":
                self._board.put(rank, position_from(facts))
            case "window":
                self._board.add_window(rank, WorkWindow(**facts))
            case "failure":
                self._news.append(RankNews(rank, failure_from(facts, self.host(rank))))
            case "exited":
                self._news.append(RankNews(rank, exit_code=facts["code"]))
            case "gone":
                text = self._gone[rank] = facts["text"]
                # As with a process that was killed: it comes before what the others say of it.
                failure = Failure(rank, 1, text, text, killed=True, host=self.host(rank), seconds=0.0)
                self._news.append(RankNews(rank, failure, exit_code=1))
            case _:
                self._answers[rank] = message
