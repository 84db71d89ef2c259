"""Room for ranks on a cluster: a placement group per replica of the model, with a worker per rank in it.

A replica's workers are reserved together, so a run that may shrink and grow (launch.min_workers) has as many replicas
as there is room for: where a machine is lost, Ray looks for another place for its replicas, and the run takes them back
when they are there.
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from launch.forking.environment import passed_environment
from launch.on_ray.cluster import num_worker_cpus
from launch.on_ray.host import NEWS, HostFacts, RankHost
from launch.on_ray.ranking import legal_sizes
from launch.rank.cores import record_of_user
from launch.rank.signals import StopSignal
from llmtrain.config.schema import RunConfig
from llmtrain.errors import LaunchError

_logger = logging.getLogger(__name__)

SETTLE_SECONDS = 5.0
"""Time that a run that may have fewer ranks waits for more before it begins."""

POLL_SECONDS = 0.05

MOST_STARTS = 3
"""A worker that cannot be started so often ends the run, with what it says."""


@dataclass
class Worker:
    """An actor in a replica's placement group. `facts` are known once it is ready.

    `asked` and `news` are the questions to it that are open: whether it is ready or lives, and what is new.
    """

    actor: Any
    asked: Any
    facts: HostFacts | None = None
    news: Any = None


class HeadLostError(LaunchError):
    """The head of the cluster answers no more."""


class Replica:
    """The workers of one replica of the model."""

    def __init__(self, size: int, bundle: Mapping[str, float], start: Sequence[Any]) -> None:
        """So many workers, with the resources of a bundle each; `start` is what RankHost is made from."""
        self._group: PlacementGroup = placement_group([dict(bundle)] * size, strategy="PACK")
        self._bundle, self._start = bundle, start
        self.workers: list[Worker | None] = [None] * size
        self._starts = 0
        self._problem: Exception | None = None

    @property
    def name(self) -> str:
        """The name of its placement group at Ray."""
        return self._group.id.hex()

    def is_ready(self) -> bool:
        """True once all its workers can fork ranks; starts those that are missing. Only where there is room for it.

        Raises LaunchError where a worker cannot be started.
        """
        ready = True
        for bundle, worker in enumerate(self.workers):
            if worker is None:
                self._start_worker(bundle)
                ready = False
            elif worker.asked is not None:
                ready = self._hear(bundle, worker) and ready
        return ready

    def ask(self) -> None:
        """Ask the workers whether they still live: they count as ready again when they have answered."""
        for worker in self.workers:
            if worker is not None and worker.asked is None:
                worker.asked = worker.actor.ping.remote()

    def drop(self, bundle: int) -> None:
        """End a worker that is of no use any more; another takes its place."""
        worker, self.workers[bundle] = self.workers[bundle], None
        if worker is not None:
            ray.kill(worker.actor)

    def remove(self) -> None:
        """Give the room back; this ends the workers."""
        remove_placement_group(self._group)

    def _start_worker(self, bundle: int) -> None:
        if self._starts >= MOST_STARTS * len(self.workers):
            raise LaunchError(f"a worker of the cluster cannot be started: {self._problem}")
        self._starts += 1
        host: Any = ray.remote(concurrency_groups={NEWS: 1})(RankHost)  # pyright: ignore[reportCallIssue]
        actor: Any = host.options(
            num_cpus=self._bundle["CPU"],
            num_gpus=self._bundle.get("GPU", 0),
            scheduling_strategy=PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=bundle),
        )
        actor = actor.remote(*self._start)
        self.workers[bundle] = Worker(actor, actor.ready.remote())

    def _hear(self, bundle: int, worker: Worker) -> bool:
        """True where a worker has answered; one that is dead is forgotten."""
        done, _ = ray.wait([worker.asked], timeout=0)
        if not done:
            return False
        try:
            answer: Any = ray.get(worker.asked)
        except LaunchError:
            raise
        except RayError as error:
            self._problem = error
            self.workers[bundle] = None
            return False
        worker.asked = None
        worker.facts = answer or worker.facts
        self._starts = 0
        return True


class RankPlacement:
    """All replicas of a run. As a context manager it gives everything back."""

    def __init__(self, config: RunConfig, folder: str, environment: Mapping[str, str]) -> None:
        self._config = config
        self._sizes = legal_sizes(config)
        launch = config.launch
        bundle = {"CPU": float(num_worker_cpus(launch))}
        on_gpu = launch.device == "cuda" or (launch.device == "auto" and ray.cluster_resources().get("GPU", 0) > 0)
        if on_gpu:
            bundle["GPU"] = 1.0
        self._bundle = bundle
        size = config.parallel.replica_size
        passed = {**passed_environment(environment, launch.pass_environment), **record_of_user(environment)}
        start = (folder, config.engine.name, passed)
        self.replicas = [Replica(size, bundle, start) for _ in range(launch.num_workers // size)]

    def __enter__(self) -> "RankPlacement":
        return self

    def __exit__(self, *_: object) -> None:
        # A head that is gone, which has been said by then, keeps nothing.
        with suppress(RayError):
            for replica in self.replicas:
                replica.remove()

    def gather(self, stop: StopSignal, head_answers: Callable[[], bool]) -> list[Replica]:
        """Wait for as many replicas as the run may have; empty where it is told to stop meanwhile.

        Raises LaunchError where there is no room, or workers cannot be started, HeadLostError where the head is gone.
        """
        began = time.monotonic()
        for replica in self.replicas:
            replica.ask()
        told = False
        while not stop.requested:
            # Ray ends a process that waits for a dead head with a question, without a word.
            if not head_answers():
                raise HeadLostError("the head of the cluster answers no more")
            # Those for which there is room will be ready soon.
            hoped = self._with_room()
            ready = [replica for replica in hoped if replica.is_ready()]
            waited = time.monotonic() - began
            size = self._largest(len(ready))
            if size and (len(ready) == len(self.replicas) or (len(ready) == len(hoped) and waited > SETTLE_SECONDS)):
                return ready[: size // self._config.parallel.replica_size]
            if waited > self._config.launch.timeout_seconds:
                raise LaunchError(self._no_room(len(ready)))
            if waited > SETTLE_SECONDS and not told and len(hoped) < len(self.replicas):
                told = True
                _logger.info("waiting for room on the cluster: %s", self._resources())
            time.sleep(POLL_SECONDS)
        return []

    def can_grow(self, size: int) -> bool:
        """True where a run of so many ranks could have more. Asks the cluster: not for the thread that watches."""
        if size == self._sizes[0]:
            return False
        largest = self._largest(sum(replica.is_ready() for replica in self._with_room()))
        return largest is not None and largest > size

    def _with_room(self) -> list[Replica]:
        """The replicas for which Ray has found a place; one question for all of them."""
        groups: Any = placement_group_table()
        return [replica for replica in self.replicas if groups.get(replica.name, {}).get("state") == "CREATED"]

    def _largest(self, num_replicas: int) -> int | None:
        """The largest legal number of ranks on so many replicas."""
        most = num_replicas * self._config.parallel.replica_size
        return next((size for size in self._sizes if size <= most), None)

    def _resources(self) -> str:
        """The resources that are wanted, and those of the cluster, in words."""
        total, free = ray.cluster_resources(), ray.available_resources()
        each = " and ".join(f"{amount:g} {name}" for name, amount in self._bundle.items())
        has = " and ".join(f"{total.get(name, 0):g} {name} ({free.get(name, 0):g} free)" for name in self._bundle)
        return f"launch.num_workers = {self._config.launch.num_workers} with {each} each, and the cluster has {has}"

    def _no_room(self, num_ready: int) -> str:
        have = num_ready * self._config.parallel.replica_size
        return (
            f"no room for the run within launch.timeout_seconds = {self._config.launch.timeout_seconds:g}: "
            f"{self._resources()}; workers that were ready: {have}. Add machines, ask for fewer ranks, or set "
            "launch.min_workers."
        )


def iter_machines(replicas: Sequence[Replica]) -> Iterator[list[str]]:
    """The machine of each worker, by replica. All of them are ready."""
    for replica in replicas:
        facts = [worker.facts for worker in replica.workers if worker]
        yield [found.node for found in facts if found]
