"""What is heard of workers, with a stand-in for Ray: no answer is lost between two attempts."""

from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayError

from launch.on_ray import workers
from launch.on_ray.placement import Worker
from launch.on_ray.ranking import Seat
from launch.on_ray.workers import Member, RayAgents


class Actor:
    """Questions are numbers. `answers` has what came back for those that were answered, in their order."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.answers: dict[int, Any] = {}
        self.news = SimpleNamespace(remote=self._ask)

    def _ask(self, seconds: float) -> int:
        self.asked.append(len(self.asked))
        return self.asked[-1]


@pytest.fixture
def actor(monkeypatch: pytest.MonkeyPatch) -> Actor:
    actor = Actor()

    def wait(asked: list[int], timeout: float, num_returns: int = 1) -> tuple[list[int], list[int]]:
        done = [question for question in asked if question in actor.answers]
        return done, [question for question in asked if question not in done]

    def get(question: int) -> Any:
        if isinstance(actor.answers[question], Exception):
            raise actor.answers[question]
        return actor.answers[question]

    monkeypatch.setattr(workers, "ray", SimpleNamespace(wait=wait, get=get))
    return actor


def members(actor: Actor) -> list[Member]:
    return [Member(None, Seat(0, 0, 0, 1), Worker(actor, None))]  # type: ignore[arg-type]  # no replica is asked


def test_the_next_attempt_gets_what_the_last_one_did_not_wait_for(actor: Actor) -> None:
    team = members(actor)
    first = RayAgents(team)
    assert list(first.listen(0)) == []
    actor.answers[0] = [{"say": "ended"}]
    assert list(first.listen(0)) == [(0, {"say": "ended"})]
    second = RayAgents(team)
    assert actor.asked == [0, 1], "one question is open, as when the first attempt ended"
    actor.answers[1] = [{"say": "listening", "port": 7}]
    assert list(second.listen(0)) == [(0, {"say": "listening", "port": 7})]
    assert actor.asked == [0, 1, 2]


def test_a_worker_that_has_died_is_not_asked_again(actor: Actor) -> None:
    agents = RayAgents(members(actor))
    actor.answers[0] = RayError("first line\nThe actor died because its node has died. Some common causes are: x")
    [(rank, message)] = agents.listen(0)
    assert (rank, message["say"]) == (0, "gone")
    assert message["text"] == "its worker on the cluster has died: The actor died because its node has died."
    assert list(agents.listen(0)) == []
    assert actor.asked == [0]
