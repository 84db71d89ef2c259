"""Which rank's failure is the cause, and how it is shown."""

from dataclasses import replace

from launch.rank.failure import Failure, OtherRankFailedError, failure_text, first_cause
from llmtrain.errors import ConfigError, DataError, Problem


def raised(rank: int, error: Exception) -> Failure:
    """The failure of an error that was really raised, so that it has a traceback."""
    try:
        raise error
    except Exception as caught:
        return replace(Failure.of_error(rank, caught), host="h")


def test_the_earliest_is_the_cause() -> None:
    late, early = raised(0, RuntimeError("peer closed")), replace(raised(1, ValueError("bad")), seconds=1.0)
    assert first_cause([late, early]) is early
    text = failure_text([late, early], stopped=[2], logs="runs/x/logs/rank-00001.log").splitlines()
    assert text[:2] == ["error: rank 1 on h failed:", "Traceback (most recent call last):"]
    assert text[-4:] == [
        "ValueError: bad",
        "then rank 0 on h: RuntimeError: peer closed",
        "then rank 2: stopped",
        "logs: runs/x/logs/rank-00001.log",
    ]


def test_a_killed_rank_comes_before_those_that_noticed() -> None:
    noticed, killed = replace(raised(0, RuntimeError("peer closed")), seconds=1.0), Failure.of_exit(3, -9)
    assert first_cause([noticed, killed]) is killed
    assert killed.exit_code == 1
    assert "was killed by SIGKILL" in failure_text([noticed, killed]).splitlines()[0]


def test_a_consequence_is_never_the_cause() -> None:
    follows = replace(raised(1, OtherRankFailedError("rank 0 could not start", 3)), seconds=1.0)
    cause = raised(0, DataError("damaged"))
    assert first_cause([follows, cause]) is cause
    assert follows.exit_code == 3
    assert failure_text([follows, cause]) == "error: rank 0 on h: damaged\nthen rank 1 on h: rank 0 could not start"


def test_what_is_the_launchers_own_names_no_rank() -> None:
    failure = Failure(0, 1, "the cluster is gone", "the cluster is gone", lasting=True, host="")
    assert failure_text([failure]) == "error: the cluster is gone"


def test_every_problem_of_a_configuration_is_shown() -> None:
    failure = raised(0, ConfigError([Problem("a.b", "is wrong."), Problem("c", "too.")]))
    assert (failure.exit_code, failure.details) == (2, "a.b: is wrong.\nc: too.")


def test_it_travels_as_bytes() -> None:
    failure = raised(2, ValueError("ä\nb"))
    assert Failure.from_bytes(failure.to_bytes()) == failure
