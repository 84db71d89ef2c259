"""Functions that run on several ranks at once, in processes forked from a server that has imported everything."""

from collections.abc import Callable
from typing import Any

from llmtrain.checks.parity.rank_pool import Forks, RankError
from llmtrain.config.engines import ENGINES

__all__ = ["RankError", "run_ranks"]

PRELOADED = (
    "torch",
    "torch.distributed",
    "launch.rank.worker",
    *(row.module for row in ENGINES.values()),
    "tests.support.samples",
    "tests.parity.resharding",
)
"""What the server imports, where it is there."""

_forks = Forks(PRELOADED)


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout_seconds: float = 60.0) -> list[Any]:
    """`llmtrain.checks.parity.rank_pool.Forks.run` with a bound that suits tests."""
    return _forks.run(function, world_size, *args, timeout_seconds=timeout_seconds)
