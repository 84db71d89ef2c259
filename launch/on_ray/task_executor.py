"""Calls of functions as Ray's tasks: Ray places them, and calls them again where their node has died.

What is imported here imports Ray, so it is imported within `ray_cluster`.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import ray
from ray.exceptions import RayError, RayTaskError

from llmtrain.errors import LaunchError

if TYPE_CHECKING:
    from launch.on_ray.cluster import Cluster

Argument = TypeVar("Argument")
Result = TypeVar("Result")

MOST_CALLS = 4
"""Times that a task is called again where its process or node has died."""

ASK_SECONDS = 5.0
"""Without a result for so long, the head is asked whether it is there."""


class RayTasks:
    """See data_pipelines.pipeline.executors.Executor. Nodes have the same files and the same llmtrain.

    Relative paths are those of the folder in which this process is: names of documents hold paths, so an absolute one
    would give another result.
    """

    def __init__(self, cluster: "Cluster", workers: int) -> None:
        self._cluster = cluster
        self._workers = workers or max(1, int(ray.cluster_resources().get("CPU", 1)))

    def each(
        self, function: Callable[[Argument], Result], arguments: Iterable[Argument]
    ) -> Iterator[tuple[Argument, Result]]:
        """Arguments with their results, as they come. Raises LaunchError where the cluster is gone, or a task kills
        every process that does it; else what the function raises."""
        call = ray.remote(num_cpus=1, max_retries=MOST_CALLS)(function_call).remote
        sent, folder = ray.put(function), str(Path.cwd())  # put: once, and not with every call
        left = iter(arguments)
        waiting: dict[Any, Argument] = {}
        while True:
            while len(waiting) < 2 * self._workers and (argument := next(left, None)) is not None:
                waiting[call(folder, sent, argument)] = argument
            if not waiting:
                return
            done, _ = ray.wait(list(waiting), timeout=ASK_SECONDS)
            if not done and not self._cluster.is_alive():
                raise LaunchError(
                    f"Ray's head at {self._cluster.address} does not answer any more. What is done stays done: the "
                    "same command continues once there is a cluster."
                )
            for answer in done:
                argument = waiting.pop(answer)
                yield argument, _result(answer, argument)


def function_call(folder: str, function: Callable[[Any], Any], argument: Any) -> Any:
    """What runs on a node. Raises LaunchError where it does not have the folder."""
    try:
        os.chdir(folder)
    except OSError as error:
        raise LaunchError(
            f"{folder}: cannot be used on {os.uname().nodename}: {error.strerror}. Every node of the cluster needs the "
            "folder in which the pipeline is started, at the same path."
        ) from None
    return function(argument)


def _result(answer: Any, argument: object) -> Any:
    try:
        return ray.get(answer)
    except RayTaskError as error:
        if not isinstance(error.cause, RayError):
            raise error.cause from None
        reason = str(error.cause).strip().splitlines()[0]
        raise LaunchError(
            f"{argument}: a node of the cluster cannot do it ({reason}). Every node needs the same llmtrain."
        ) from None
    except RayError as error:
        reason = str(error).strip().splitlines()[0]
        raise LaunchError(
            f"{argument}: could not be done in {MOST_CALLS + 1} tries on the cluster ({reason}). Its nodes may have "
            "too little memory: try fewer run.workers."
        ) from None
