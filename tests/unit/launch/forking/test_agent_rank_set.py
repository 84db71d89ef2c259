"""What a crew of nurseries makes of their messages, and what it asks them."""

from collections import deque
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.forking.agent_rank_set import SILENT, Message, NurseryCrew
from launch.rank.heartbeat import PulseBoard
from launch.rank.place import Rank
from launch.rank.stop import StopSignal
from launch.supervision.watch import watch
from llmtrain.config.reading.load import load_config
from llmtrain.config.schema import RunConfig
from llmtrain.errors import EXIT_PREEMPTED, LaunchError
from tests.support.run_files import write_good_run

PLACES = [Rank(0, 2), Rank(1, 2)]
SECONDS_TO_ANSWER = 0.2


class Scripted:
    """Nurseries that answer as they are told to beforehand; `told` is what they were told."""

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


def crew_of(nurseries: Scripted, board: PulseBoard | None = None, stop: StopSignal | None = None) -> NurseryCrew:
    return NurseryCrew(nurseries, PLACES, board or PulseBoard(2, 5), stop or StopSignal())


def exited(rank: int, code: int) -> tuple[int, Message]:
    return rank, {"say": "exited", "code": code}


def test_all_ranks_meet_at_the_store_of_rank_0(config: RunConfig) -> None:
    nurseries = Scripted({"listen": [(0, {"say": "listening", "port": 4711})]})
    crew_of(nurseries).start(config)
    places = [Rank(**start["place"]) for start in nurseries.starts]
    assert [(place.rank, place.host, place.port) for place in places] == [(0, "10.0.0.0", 4711), (1, "10.0.0.0", 4711)]
    assert all(start["first_step"] == 5 for start in nurseries.starts)
    assert RunConfig.model_validate_json(nurseries.starts[1]["config"]) == config


def test_a_silent_first_nursery_ends_the_start(config: RunConfig) -> None:
    with pytest.raises(LaunchError, match=rf"^{SILENT}"):
        crew_of(Scripted()).start(config)
    gone = Scripted({"listen": [(0, {"say": "gone", "text": "its machine burns"})]})
    with pytest.raises(LaunchError, match=r"^its machine burns"):
        crew_of(gone).start(config)


def test_positions_and_windows_reach_the_board() -> None:
    nurseries, board = Scripted(), PulseBoard(2, 0)
    work = {"data": 0.5, "step": 1.5}
    nurseries.said.extend(
        [
            (1, {"say": "position", "section": "checkpoint", "step": 7, "since": 2.0, "first_step": 5}),
            *(
                (rank, {"say": "window", "step": 6, "work": work, "places": {"data": "", "step": "f"}})
                for rank in (0, 1)
            ),
            exited(0, 0),
            exited(1, 0),
        ]
    )
    config = RunConfig.model_fields["launch"].default_factory()  # type: ignore[misc,call-arg]
    ending = watch(crew_of(nurseries, board), board, StopSignal(), config)
    assert ending.failures == () and ending.exit_code == 0
    assert (board.positions()[1].section, board.positions()[1].step) == ("checkpoint", 7)
    assert board.windows(0)[1].work == work


def test_failures_and_deaths_are_told_with_their_machines(config: RunConfig) -> None:
    nurseries, board = Scripted(), PulseBoard(2, 0)
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
    nurseries.said.extend([(0, {"say": "failure", **failure}), exited(0, 1), (1, {"say": "gone", "text": "burns"})])
    ending = watch(crew_of(nurseries, board), board, StopSignal(), config.launch)
    by_rank = {found.rank: found for found in ending.failures}
    assert (by_rank[0].host, by_rank[1].host) == ("node0", "node1")
    assert by_rank[1].killed and by_rank[1].seconds < by_rank[0].seconds


def test_a_rank_that_dies_unheard_is_told_by_its_signal(config: RunConfig) -> None:
    nurseries, board = Scripted(), PulseBoard(2, 0)
    nurseries.said.extend([exited(0, 0), exited(1, -9)])
    ending = watch(crew_of(nurseries, board), board, StopSignal(), config.launch)
    [failure] = ending.failures
    assert failure.host == "node1" and "SIGKILL" in failure.summary


def test_told_to_stop_every_rank_is_told_once(config: RunConfig) -> None:
    nurseries, board, stop = Scripted(), PulseBoard(2, 0), StopSignal()
    stop._anybody_told[0] = 1
    nurseries.answers["stop"] = [exited(0, EXIT_PREEMPTED), exited(1, EXIT_PREEMPTED)]
    ending = watch(crew_of(nurseries, board, stop), board, stop, config.launch)
    assert ending.exit_code == EXIT_PREEMPTED and not ending.failures
    assert nurseries.told == [(0, "stop"), (1, "stop")]


def test_it_is_passed_on_where_places_are_wanted() -> None:
    nurseries, board = Scripted(), PulseBoard(2, 0)
    crew = crew_of(nurseries, board)
    board.want_places(1, True)
    crew.news({0, 1})
    crew.news({0, 1})
    board.want_places(1, False)
    crew.news({0, 1})
    assert nurseries.told == [(1, "places"), (1, "places")]


def test_helpless_are_the_stopped_the_silent_and_the_gone() -> None:
    nurseries = Scripted({"helpless": [(0, {"say": "helpless", "text": ""})]})
    crew = crew_of(nurseries)
    assert crew.helpless({0, 1}) == {1: SILENT}
    nurseries.answers["helpless"] = [(0, {"say": "helpless", "text": "stopped"}), (1, {"say": "gone", "text": "burns"})]
    assert crew.helpless({0, 1}) == {0: "stopped", 1: "burns"}


def test_the_end_names_nurseries_that_cannot_be_used_again() -> None:
    nurseries = Scripted({"end": [(0, {"say": "ended"})]})
    assert crew_of(nurseries).end() == {1}
    nurseries.answers["end"].append((1, {"say": "ended"}))
    assert crew_of(nurseries).end() == set()
