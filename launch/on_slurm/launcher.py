"""Ranks as tasks of a Slurm job: `llmtrain train` runs inside the allocation, on its first node, and calls srun.

One step of one task per rank serves all attempts. A task has everything imported and forks its rank anew for each
attempt, so that a start after a failure costs what it costs on one machine. Where a task is lost, so is the step, and
the next attempt starts another one.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace

from launch.forking.agent_rank_set import AgentRankSet
from launch.on_slurm.step import SlurmAgents, Step, Task
from launch.rank.cores import user_threads
from launch.rank.failure import Failure
from launch.rank.signals import HeartbeatBoard, StopSignal
from launch.supervision.attempt import Ending, sum_up, watch, watches_speed
from launch.supervision.restarts import AttemptEnd, newest_step, supervise
from launch.supervision.stragglers import Stragglers
from llmtrain.config.schema import RunConfig
from llmtrain.errors import EXIT_PREEMPTED, LaunchError
from llmtrain.preflight.resolve import ResolvedRun


def launch(resolved: ResolvedRun) -> int:
    """Run it on the nodes of this job and return the exit code. Raises LaunchError outside of a job."""
    config = resolved.config
    cpus = cpus_per_task(config, os.environ)
    # Slurm may bind a task to its own CPUs: how many these are cannot be told from what a rank finds there.
    threads = config.launch.threads_per_worker or user_threads(os.environ) or cpus
    config = config.with_keys({"launch.threads_per_worker": threads})
    with StopSignal() as stop:
        attempts = SlurmAttempts(config, stop, cpus)
        try:
            return supervise(config, attempts.run, attempts.launch_id)
        finally:
            attempts.end_step()


def cpus_per_task(config: RunConfig, environment: Mapping[str, str]) -> int:
    """CPUs of one task: those that the job has asked for, else as configured. Raises LaunchError outside of a job."""
    if "SLURM_JOB_ID" not in environment:
        raise LaunchError(
            "launch.backend = slurm: this is no Slurm job. Submit one with `llmtrain submit CONFIG --to slurm`, "
            "or start this command in a batch script."
        )
    asked = environment.get("SLURM_CPUS_PER_TASK", "")
    return int(asked) if asked.isdecimal() else cpus_per_rank(config)


def cpus_per_rank(config: RunConfig) -> int:
    """CPUs that a job asks for, for each rank."""
    return config.launch.cpus_per_worker or max(1, config.launch.threads_per_worker)


class SlurmAttempts:
    """Starts all ranks of a run and waits for their end, as often as asked, with the same tasks while they live."""

    def __init__(self, config: RunConfig, stop: StopSignal, cpus: int) -> None:
        self._config = config
        self._stop = stop
        self._cpus = cpus
        # A job that is requeued after a machine has died takes its run folder over at once.
        self.launch_id = f"slurm-job-{os.environ['SLURM_JOB_ID']}"
        self._step: Step | None = None
        self._tasks: Sequence[Task] = ()

    def run(self, number: int) -> AttemptEnd:
        """One attempt, from the newest valid checkpoint."""
        config = self._config
        board = HeartbeatBoard(config.launch.num_workers, newest_step(config.run_dir))
        try:
            ending = self._ending(number, board)
        except LaunchError as error:
            self.end_step()
            ending = Ending((Failure.of_error(0, error),), exit_code=error.exit_code)
        return sum_up(config, ending, board, self._stop)

    def end_step(self) -> None:
        """End what runs in the job beside this launcher."""
        if self._step:
            self._step.end(self._tasks)
        self._step, self._tasks = None, ()

    def _ending(self, number: int, board: HeartbeatBoard) -> Ending:
        config = self._config
        if self._step is None:
            self._step = Step(config, self._cpus)
        if not self._tasks:
            self._tasks = self._step.gather(config.launch.num_workers, self._stop) or ()
        if not self._tasks:  # told to stop before anything has begun
            self.end_step()
            return Ending(exit_code=EXIT_PREEMPTED)
        places = [replace(task.place, attempt=number, launch_id=self.launch_id) for task in self._tasks]
        rank_set = AgentRankSet(SlurmAgents(self._tasks), places, board, self._stop)
        try:
            rank_set.start(config)
            look = Stragglers(config, board, rank_set.host).look if watches_speed(config) else lambda: None
            return watch(rank_set, board, self._stop, config.launch, look)
        finally:
            if rank_set.end():  # some tasks are gone
                self.end_step()
