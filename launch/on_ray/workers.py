"""The workers of an attempt's ranks on Ray, as the agents that they pass messages on to."""

import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError

from launch.forking.agent_rank_set import Message
from launch.on_ray.host import HostFacts
from launch.on_ray.placement import Replica, Worker
from launch.on_ray.ranking import Seat

NEWS_SECONDS = 30.0
"""Time that a worker waits for news before it is asked again."""


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


class RayAgents:
    """See `launch.forking.agent_rank_set.RankAgents`. Each worker is always asked for news.

    Ray ends no call of an actor that has begun: what it brings when nobody waits for it any more would be lost. So the
    question that is left open when an attempt ends stays with its worker, and the next attempt gets the answer.
    """

    def __init__(self, members: Sequence[Member]) -> None:
        self._members = members
        self._asked: dict[Any, int] = {}
        for rank in range(len(members)):
            self._ask(rank)

    def tell(self, rank: int, message: Message) -> None:
        """See `RankAgents`."""
        self._members[rank].worker.actor.tell.remote(message)

    def listen(self, seconds: float) -> Iterator[tuple[int, Message]]:
        """See `RankAgents`."""
        if not self._asked:
            time.sleep(seconds)
            return
        done, _ = ray.wait(list(self._asked), timeout=seconds)
        if done:
            done, _ = ray.wait(list(self._asked), num_returns=len(self._asked), timeout=0)
        for answer in done:
            rank = self._asked.pop(answer)
            self._members[rank].worker.news = None
            try:
                messages: Any = ray.get(answer)
            except RayError as error:
                # Ray's text is long: of a dead actor the line that tells more than that, without the guesses behind it.
                lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [repr(error)]
                reason = next((line for line in lines[1:] if line.startswith("The actor")), lines[0])
                reason = re.split(r" Some common causes| The task may or may not", reason, maxsplit=1)[0]
                messages = [{"say": "gone", "text": f"its worker on the cluster has died: {reason}"}]
            yield from ((rank, message) for message in messages)
            if not any(message["say"] == "gone" for message in messages):
                self._ask(rank)

    def host(self, rank: int) -> str:
        """See `RankAgents`."""
        return self._members[rank].facts.hostname

    def address(self, rank: int) -> str:
        """See `RankAgents`."""
        return self._members[rank].facts.address

    def _ask(self, rank: int) -> None:
        worker = self._members[rank].worker
        if worker.news is None:
            worker.news = worker.actor.news.remote(NEWS_SECONDS)
        self._asked[worker.news] = rank
