"""What a rank_set of agents makes of their messages, and what it asks them."""

from collections import deque
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.forking.agent_rank_set import SILENT, AgentRankSet, Message
from launch.rank.place import Rank
from launch.rank.signals import HeartbeatBoard, StopSignal
from launch.supervision.attempt import watch
from llmtrain.config.reading.load import load_config
from llmtrain.config.schema import RunConfig
from llmtrain.errors import EXIT_PREEMPTED, LaunchError
from tests.support.run_files import write_good_run

PLACES = [Rank(0, 2), Rank(1, 2)]
SECONDS_TO_ANSWER = 0.2


class Scripted:
    """RankAgents that answer as they are told to beforehand; `told` is what they were told."""

    def __init__(self, answers: dict[str, list[tuple[int, Message]]] | None = None) -> None:
        self.answers = answers or {}
        self.told: list[tuple[int, str]] = []
        self.starts: list[Message] = []
        self.said: deque[tuple[int, Message]] = deque()

    def tell(self, rank: int, message: Message) -> None:
        self.told.append((rank, message["do"]))
        if message["do"] == "start":
            self.starts.append(message)
        self.said.extend(answer for answer in self.answers.get(message["do"], []) if answer[0] == rank)

    def listen(self, seconds: float) -> Iterator[tuple[int, Message]]:
        while self.said:
            yield self.said.popleft()

    def host(self, rank: int) -> str:
        return f"node{rank}"

    def address(self, rank: int) -> str:
        return f"10.0.0.{rank}"


@pytest.fixture(autouse=True)
def short_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.forking.agent_rank_set.ANSWER_SECONDS", SECONDS_TO_ANSWER)
    monkeypatch.setattr("launch.forking.agent_rank_set.START_SECONDS", SECONDS_TO_ANSWER)


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    monkeypatch.chdir(tmp_path)
    return load_config(write_good_run(tmp_path), ["launch.num_workers=2"]).config


def rank_set_of(agents: Scripted, board: HeartbeatBoard | None = None, stop: StopSignal | None = None) -> AgentRankSet:
    return AgentRankSet(agents, PLACES, board or HeartbeatBoard(2, 5), stop or StopSignal())


def exited(rank: int, code: int) -> tuple[int, Message]:
    return rank, {"say": "exited", "code": code}


def test_all_ranks_meet_at_the_store_of_rank_0(config: RunConfig) -> None:
    agents = Scripted({"listen": [(0, {"say": "listening", "port": 4711})]})
    rank_set_of(agents).start(config)
    places = [Rank(**start["place"]) for start in agents.starts]
    assert [(place.rank, place.host, place.port) for place in places] == [(0, "10.0.0.0", 4711), (1, "10.0.0.0", 4711)]
    assert all(start["first_step"] == 5 for start in agents.starts)
    assert RunConfig.model_validate_json(agents.starts[1]["config"]) == config


def test_a_silent_first_agent_ends_the_start(config: RunConfig) -> None:
    with pytest.raises(LaunchError, match=rf"^{SILENT}"):
        rank_set_of(Scripted()).start(config)
    gone = Scripted({"listen": [(0, {"say": "gone", "text": "its machine burns"})]})
    with pytest.raises(LaunchError, match=r"^its machine burns"):
        rank_set_of(gone).start(config)


def test_positions_and_windows_reach_the_board() -> None:
    agents, board = Scripted(), HeartbeatBoard(2, 0)
    work = {"data": 0.5, "step": 1.5}
    agents.said.extend(
        [
            (1, {"say": "position", "phase": "checkpoint", "step": 7, "since": 2.0, "first_step": 5}),
            *(
                (rank, {"say": "window", "step": 6, "work": work, "places": {"data": "", "step": "f"}})
                for rank in (0, 1)
            ),
            exited(0, 0),
            exited(1, 0),
        ]
    )
    config = RunConfig.model_fields["launch"].default_factory()  # type: ignore[misc,call-arg]
    ending = watch(rank_set_of(agents, board), board, StopSignal(), config)
    assert ending.failures == () and ending.exit_code == 0
    assert (board.positions()[1].phase, board.positions()[1].step) == ("checkpoint", 7)
    assert board.windows(0)[1].work == work


def test_failures_and_deaths_are_told_with_their_machines(config: RunConfig) -> None:
    agents, board = Scripted(), HeartbeatBoard(2, 0)
    failure = {
        "rank": 0,
        "exit_code": 1,
        "summary": "peer closed",
        "details": "peer closed",
        "consequence": False,
        "killed": False,
        "lasting": False,
        "host": "elsewhere",
        "seconds": 0.1,
    }
    agents.said.extend([(0, {"say": "failure", **failure}), exited(0, 1), (1, {"say": "gone", "text": "burns"})])
    ending = watch(rank_set_of(agents, board), board, StopSignal(), config.launch)
    by_rank = {found.rank: found for found in ending.failures}
    assert (by_rank[0].host, by_rank[1].host) == ("node0", "node1")
    assert by_rank[1].killed and by_rank[1].seconds < by_rank[0].seconds


def test_a_rank_that_dies_unheard_is_told_by_its_signal(config: RunConfig) -> None:
    agents, board = Scripted(), HeartbeatBoard(2, 0)
    agents.said.extend([exited(0, 0), exited(1, -9)])
    ending = watch(rank_set_of(agents, board), board, StopSignal(), config.launch)
    [failure] = ending.failures
    assert failure.host == "node1" and "SIGKILL" in failure.summary


def test_told_to_stop_every_rank_is_told_once(config: RunConfig) -> None:
    agents, board, stop = Scripted(), HeartbeatBoard(2, 0), StopSignal()
    stop._anybody_told[0] = 1
    agents.answers["stop"] = [exited(0, EXIT_PREEMPTED), exited(1, EXIT_PREEMPTED)]
    ending = watch(rank_set_of(agents, board, stop), board, stop, config.launch)
    assert ending.exit_code == EXIT_PREEMPTED and not ending.failures
    assert agents.told == [(0, "stop"), (1, "stop")]


def test_it_is_passed_on_where_places_are_wanted() -> None:
    agents, board = Scripted(), HeartbeatBoard(2, 0)
    rank_set = rank_set_of(agents, board)
    board.want_places(1, True)
    rank_set.news({0, 1})
    rank_set.news({0, 1})
    board.want_places(1, False)
    rank_set.news({0, 1})
    assert agents.told == [(1, "places"), (1, "places")]


def test_helpless_are_the_stopped_the_silent_and_the_gone() -> None:
    agents = Scripted({"helpless": [(0, {"say": "helpless", "text": ""})]})
    rank_set = rank_set_of(agents)
    assert rank_set.helpless({0, 1}) == {1: SILENT}
    agents.answers["helpless"] = [(0, {"say": "helpless", "text": "stopped"}), (1, {"say": "gone", "text": "burns"})]
    assert rank_set.helpless({0, 1}) == {0: "stopped", 1: "burns"}


def test_the_end_names_agents_that_cannot_be_used_again() -> None:
    agents = Scripted({"end": [(0, {"say": "ended"})]})
    assert rank_set_of(agents).end() == {1}
    agents.answers["end"].append((1, {"say": "ended"}))
    assert rank_set_of(agents).end() == set()
