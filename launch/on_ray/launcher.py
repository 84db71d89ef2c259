"""Ranks on a Ray cluster: room for them, attempts, and what follows when ranks, workers or machines are lost.

Ray places the ranks, starts and watches the workers, and carries messages. It does not know the ranks: each is forked
by a process that its worker has started, so a rank that is started again imports nothing anew, and no library's process
group is ever rebuilt in place.
"""

import logging
import os
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from launch.forking.agent_rank_set import AgentRankSet
from launch.on_ray.cluster import Cluster, ray_cluster
from launch.on_ray.ranking import seat_ranks
from launch.rank.failure import Failure
from launch.rank.place import Rank
from launch.rank.signals import HeartbeatBoard, StopSignal
from launch.supervision.attempt import Ending, note_stop, sum_up, watch, watches_speed
from launch.supervision.restarts import AttemptEnd, newest_step, supervise
from launch.supervision.stragglers import Stragglers
from llmtrain.config.schema import RunConfig
from llmtrain.errors import EXIT_PREEMPTED, LaunchError
from llmtrain.preflight.resolve import ResolvedRun
from llmtrain.runs.audit import record

_logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from launch.on_ray.placement import RankPlacement, Replica
    from launch.on_ray.workers import Member

LOOK_SECONDS = 2.0
"""Time between two questions to the cluster: whether its head lives, and has room for more ranks."""

SILENT_SECONDS = 30.0
"""A cluster that has kept such a question waiting for so long is lost."""


def launch(resolved: ResolvedRun) -> int:
    """Run it on its cluster and return the exit code. Raises LaunchError."""
    config = resolved.config
    with StopSignal() as stop, ray_cluster(config.launch) as cluster:
        # Ray reads its environment when it is imported, which is right now only.
        from launch.on_ray.placement import RankPlacement

        with RankPlacement(config, str(Path.cwd()), os.environ) as placement:
            attempts = RayAttempts(config, cluster, placement, stop)
            return supervise(config, attempts.run, attempts.launch_id)


class Lookout:
    """Asks the cluster now and then, in a thread of its own: a head that is gone may never answer."""

    def __init__(self, cluster: Cluster, placement: "RankPlacement", num_workers: int) -> None:
        self._cluster, self._placement, self._num_workers = cluster, placement, num_workers
        self._ended = threading.Event()
        self._asked = time.monotonic()
        self._alive = True
        self._thread = threading.Thread(target=self._look_often, name="lookout", daemon=True)
        self.has_room = False
        """True where there is room for more ranks than there are."""

    def __enter__(self) -> "Lookout":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join(SILENT_SECONDS)

    @property
    def cluster_is_lost(self) -> bool:
        return not self._alive or time.monotonic() - self._asked > SILENT_SECONDS

    def _look_often(self) -> None:
        from ray.exceptions import RayError

        while not self._ended.wait(LOOK_SECONDS):
            self._asked = time.monotonic()  # before the question, which may never return
            self._alive = self._cluster.is_alive()
            if self._alive and not self.has_room:
                # A question that fails is asked again; that the head is gone is found out by itself.
                with suppress(RayError, LaunchError):
                    self.has_room = self._placement.can_grow(self._num_workers)


class RayAttempts:
    """Starts all ranks of a run on the cluster and waits for their end, as often as asked."""

    def __init__(self, config: RunConfig, cluster: Cluster, placement: "RankPlacement", stop: StopSignal) -> None:
        self._config, self._cluster, self._placement, self._stop = config, cluster, placement, stop
        self._run_dir = config.run_dir
        self._size = 0
        self.launch_id = uuid.uuid4().hex

    def run(self, number: int) -> AttemptEnd:
        """One attempt, from the newest valid checkpoint, on as many workers as there are."""
        from ray.exceptions import RayError

        from launch.on_ray.placement import HeadLostError

        try:
            replicas = self._placement.gather(self._stop, self._cluster.answers)
        except HeadLostError:
            return self._without_head()
        except LaunchError as error:
            if number == 0:
                raise
            return self._unable(str(error))
        except RayError:
            if self._cluster.answers():
                raise
            return self._without_head()
        if not replicas:
            note_stop(self._config, self.launch_id)
            return AttemptEnd(EXIT_PREEMPTED, saved_step=newest_step(self._run_dir), told_to_stop=True)
        config, members = seated(self._config, replicas)
        self._note_size(len(members))
        board = HeartbeatBoard(len(members), newest_step(self._run_dir))
        with Lookout(self._cluster, self._placement, len(members)) as lookout:
            ending = self._ending(config, members, number, board, lookout)
        end = sum_up(config, ending, board, self._stop)
        # The lookout has ranks saved and ended, which looks like a preemption: which of the two it was is told apart
        # here.
        stopped_for_it = lookout.cluster_is_lost and end.exit_code == EXIT_PREEMPTED
        if stopped_for_it or (end.failures and not self._cluster.answers()):
            return self._without_head(end.step)
        grows = lookout.has_room and end.exit_code == EXIT_PREEMPTED and not self._stop.requested
        return replace(end, resized=grows)

    def _ending(
        self, config: RunConfig, members: "list[Member]", number: int, board: HeartbeatBoard, lookout: Lookout
    ) -> Ending:
        """Start the ranks and watch over them; none is left afterwards."""
        from launch.on_ray.workers import RayAgents

        places = [self._place(members, rank, number) for rank in range(len(members))]
        rank_set = AgentRankSet(RayAgents(members), places, board, self._stop)
        try:
            rank_set.start(config)
            return watch(rank_set, board, self._stop, config.launch, self._look(config, board, rank_set, lookout))
        except LaunchError as error:
            return Ending((Failure.of_error(0, error),), exit_code=error.exit_code)
        finally:
            for rank in rank_set.end():
                members[rank].replica.drop(members[rank].seat.bundle)

    def _place(self, members: "list[Member]", rank: int, attempt: int) -> Rank:
        seat, facts = members[rank].seat, members[rank].facts
        return Rank(
            rank,
            len(members),
            seat.local_rank,
            seat.local_world_size,
            attempt=attempt,
            device=0 if facts.has_gpu else None,
            launch_id=self.launch_id,
        )

    def _look(
        self, config: RunConfig, board: HeartbeatBoard, rank_set: AgentRankSet, lookout: Lookout
    ) -> Callable[[], None]:
        """The look at ranks while they train: slow ones, more room, a cluster that is gone."""
        stragglers = Stragglers(config, board, rank_set.host) if watches_speed(config) else None

        def look() -> None:
            if stragglers:
                stragglers.look()
            if lookout.has_room or lookout.cluster_is_lost:
                rank_set.save_and_end()

        return look

    def _without_head(self, step: int = 0) -> AttemptEnd:
        return self._unable(
            f"the head of the Ray cluster at {self._cluster.address} does not answer any more; saved at step "
            f"{newest_step(self._run_dir)}. Start the cluster again, then the same command continues.",
            step,
        )

    def _unable(self, text: str, step: int = 0) -> AttemptEnd:
        """The end of an attempt that the cluster has brought about."""
        failure = Failure(0, LaunchError.exit_code, text, text, lasting=True, host="")
        return AttemptEnd(LaunchError.exit_code, (failure,), saved_step=newest_step(self._run_dir), step=step)

    def _note_size(self, size: int) -> None:
        """Record that the run goes on with another number of ranks."""
        if self._size and size != self._size:
            _logger.info("number of ranks from now on: %d, before: %d", size, self._size)
            facts = {"from_workers": self._size, "to_workers": size, "step": newest_step(self._run_dir)}
            with suppress(OSError):
                record(self._run_dir, "resized", **facts)
        self._size = size


def seated(config: RunConfig, replicas: "list[Replica]") -> "tuple[RunConfig, list[Member]]":
    """The configuration with as many ranks as the replicas have workers, and the worker of each rank."""
    from launch.on_ray.placement import iter_machines
    from launch.on_ray.workers import Member

    seats = seat_ranks(config, list(iter_machines(replicas)))
    members = []
    for seat in seats:
        worker = replicas[seat.replica].workers[seat.bundle]
        assert worker
        members.append(Member(replicas[seat.replica], seat, worker))
    return config.with_keys({"launch.num_workers": len(seats)}), members
