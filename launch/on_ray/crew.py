"""The ranks of one attempt, forked by the workers of a cluster, as `launch.watch.watch` sees them."""

import sys
import time
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import ray
from ray.exceptions import RayError

from launch.failure import Failure
from launch.nursery import failure_from, position_from
from launch.on_ray.host import HostFacts, Message
from launch.on_ray.placement import Replica, Worker
from launch.on_ray.ranking import Seat
from launch.pulse import PulseBoard, Window
from launch.rank import Rank
from launch.stop import StopSignal
from launch.watch import POLL_SECONDS, RankNews
from launch.watchdog import DUMP_SECONDS
from llmtrain.config.schema import RunConfig

NEWS_SECONDS = 30.0
"""How long a worker waits for something to say before it is asked again."""

ANSWER_SECONDS = 2.0
"""How long a worker that lives may take to answer."""


@dataclass(frozen=True)
class Member:
    """A rank's worker, and the replica that holds it."""

    replica: Replica
    seat: Seat
    worker: Worker

    @property
    def facts(self) -> HostFacts:
        assert self.worker.facts
        return self.worker.facts


class RayCrew:
    """See `launch.watch.Crew`. What ranks print goes to this process's stderr, where they are to the board."""

    def __init__(self, members: Sequence[Member], board: PulseBoard, stop: StopSignal) -> None:
        self._members, self._board, self._stop = members, board, stop
        self._told_to_stop = False
        self._asked: dict[Any, int] = {}
        self._heard: deque[tuple[int, Message]] = deque()
        self._gone: dict[int, str] = {}
        self._looking: set[int] = set()

    def start(self, config: RunConfig, attempt: int, launch_id: str) -> None:
        """Let every worker fork its rank."""
        for rank in range(len(self._members)):
            self._ask(rank)
        first = self._members[0].facts
        self._tell(0, {"do": "listen", "address": first.address})
        ports = {rank: message["port"] for rank, message in self._answers({0}, "listening", ANSWER_SECONDS * 5)}
        # Where rank 0's worker has just died, the others' failure to meet is no news: the first look finds it.
        for rank, member in enumerate(self._members):
            place = Rank(
                rank,
                len(self._members),
                member.seat.local_rank,
                member.seat.local_world_size,
                first.address,
                ports.get(0, 0),
                attempt=attempt,
                device=0 if member.facts.has_gpu else None,
                launch_id=launch_id,
            )
            first_step = self._board.positions()[rank].step
            start = {"place": asdict(place), "config": config.model_dump_json(), "first_step": first_step}
            self._tell(rank, {"do": "start", **start})

    def news(self, running: Collection[int]) -> list[RankNews]:
        """See `Crew`."""
        if self._stop.requested:
            self.save_and_end()
        self._pass_on_wishes()
        self._listen(0.0 if self._heard else POLL_SECONDS)
        found = []
        while self._heard:
            rank, message = self._heard.popleft()
            news = self._news_of(rank, message)
            if news and rank in running:
                found.append(news)
        return found

    def save_and_end(self) -> None:
        """Tell all ranks to save and stop."""
        if not self._told_to_stop:
            self._told_to_stop = True
            for rank in range(len(self._members)):
                self._tell(rank, {"do": "stop"})

    def helpless(self, running: Collection[int]) -> Mapping[int, str]:
        """See `Crew`."""
        for rank in running:
            self._tell(rank, {"do": "helpless"})
        answers = {rank: message["text"] for rank, message in self._answers(running, "helpless", ANSWER_SECONDS)}
        silent = {rank: self._gone.get(rank, "its worker does not answer") for rank in set(running) - answers.keys()}
        return {**silent, **{rank: reason for rank, reason in answers.items() if reason}}

    def stacks(self, running: Collection[int]) -> dict[int, str]:
        """See `Crew`."""
        for rank in running:
            self._tell(rank, {"do": "stacks"})
        seconds = DUMP_SECONDS + ANSWER_SECONDS
        return dict.fromkeys(running, "") | {
            rank: message["text"] for rank, message in self._answers(running, "stacks", seconds)
        }

    def host(self, rank: int) -> str:
        """See `Crew`."""
        return self._members[rank].facts.hostname

    def end(self) -> None:
        """End all ranks, and the workers that do not answer or are gone."""
        ranks = set(range(len(self._members))) - self._gone.keys()
        for rank in ranks:
            self._tell(rank, {"do": "end"})
        ended = {rank for rank, _ in self._answers(ranks, "ended", ANSWER_SECONDS)}
        for rank, member in enumerate(self._members):
            if rank not in ended:
                member.replica.drop(member.seat.bundle)
        for asked in self._asked:
            with suppress(RayError):
                ray.cancel(asked, force=False)

    def _pass_on_wishes(self) -> None:
        """Tell the ranks of which it is wanted that they find out where they spend their time, and when no more."""
        wanted = {rank for rank in range(len(self._members)) if self._board.places_wanted(rank)}
        for rank in wanted ^ self._looking:
            self._tell(rank, {"do": "places", "wanted": rank in wanted})
        self._looking = wanted

    def _ask(self, rank: int) -> None:
        self._asked[self._members[rank].worker.actor.news.remote(NEWS_SECONDS)] = rank

    def _tell(self, rank: int, message: Message) -> None:
        self._members[rank].worker.actor.tell.remote(message)

    def _listen(self, seconds: float) -> None:
        """Put what the workers have to say among what was heard, as soon as there is something."""
        if not self._asked:
            time.sleep(seconds)
            return
        done, _ = ray.wait(list(self._asked), timeout=seconds)
        if done:
            done, _ = ray.wait(list(self._asked), num_returns=len(self._asked), timeout=0)
        for answer in done:
            rank = self._asked.pop(answer)
            try:
                messages = ray.get(answer)
            except RayError as error:
                messages = [{"say": "gone", "text": f"its worker on the cluster has died: {_first_line(error)}"}]
            self._heard.extend((rank, message) for message in messages)
            if not any(message["say"] == "gone" for message in messages):
                self._ask(rank)

    def _answers(self, ranks: Collection[int], kind: str, seconds: float) -> Iterator[tuple[int, Message]]:
        """The answers of that kind, until all ranks have given one, are gone, or time is up."""
        waiting = set(ranks) - self._gone.keys()
        deadline = time.monotonic() + seconds
        others: list[tuple[int, Message]] = []
        while waiting and time.monotonic() < deadline:
            if not self._heard:
                self._listen(min(POLL_SECONDS, max(0.0, deadline - time.monotonic())))
            while self._heard:
                rank, message = self._heard.popleft()
                if message["say"] == kind:
                    waiting.discard(rank)
                    yield rank, message
                else:
                    others.append((rank, message))
                    if message["say"] == "gone":
                        waiting.discard(rank)
        self._heard.extendleft(reversed(others))

    def _news_of(self, rank: int, message: Message) -> RankNews | None:
        """What a message means for whoever watches; what a rank prints and where it is goes where it belongs."""
        facts = {key: value for key, value in message.items() if key != "say"}
        match message["say"]:
            case "output":
                sys.stderr.buffer.write(facts["text"].encode("utf-8", "surrogateescape"))
                sys.stderr.flush()
            case "position":
                self._board.put(rank, position_from(facts))
            case "window":
                self._board.add_window(rank, Window(**facts))
            case "failure":
                return RankNews(rank, failure_from(facts, self.host(rank)))
            case "exited":
                return RankNews(rank, exit_code=facts["code"])
            case "gone":
                text = facts.get("text", "the process that forked it on its worker has died")
                self._gone[rank] = text
                failure = Failure(rank, 1, text, text, killed=True, host=self.host(rank), seconds=0.0)
                return RankNews(rank, failure, exit_code=1)
        return None


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
