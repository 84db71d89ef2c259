"""Ranks as processes of this machine.

They are forked once everything they need is imported: PyTorch and an engine are imported once, not once per rank on the
same cores, nor again when all are started again. Nothing has been computed by then, so no thread is lost in the fork.
"""

import os
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from launch.failure import Failure, failure_text
from launch.processes import Ending, RankProcess, start_rank, watch
from launch.pulse import PulseBoard
from launch.rank import Rank, num_threads, set_threads
from launch.rank_log import log_path, stacks_path
from launch.stop import StopSignal, exit_after_grace
from launch.stragglers import Stragglers
from launch.supervise import AttemptEnd, newest_step, supervise
from launch.watchdog import save_stacks
from llmtrain.config.schema import RunConfig
from llmtrain.errors import EXIT_PREEMPTED, LlmtrainError
from llmtrain.train.run_folder import RunFolder

if TYPE_CHECKING:
    from llmtrain.train.loop import Run

LOOPBACK = "127.0.0.1"


def launch(config: RunConfig, change_run: Callable[["Run", Rank], "Run"] | None = None) -> int:
    """Run the configuration and return the exit code; `change_run` may replace parts of the run on each rank."""
    set_threads(num_threads(config.launch, config.launch.num_workers))
    with StopSignal() as stop:
        if config.launch.num_workers > 1 or is_supervised(config):
            return supervise(config, Attempts(config, stop, change_run).run)
        # It imports torch: only once the configuration is known to be right.
        from launch.worker import run_worker, unchanged

        exit_after_grace(stop, config.launch.grace_seconds)
        return run_worker(config, stop, change_run=change_run or unchanged)


def is_supervised(config: RunConfig) -> bool:
    """Whether a single rank gets a process of its own, which this one can start again.

    Elsewhere than on Linux a fork after the imports is not safe with every system library.
    """
    return config.launch.max_stalled_attempts > 0 and sys.platform == "linux"


def run_as_rank(config: RunConfig, place: Rank) -> int:
    """Be one rank that another launcher started. What goes wrong is told at once, with the rank."""
    set_threads(num_threads(config.launch, place.local_world_size))
    from launch.worker import run_worker

    try:
        with StopSignal() as stop:
            exit_after_grace(stop, config.launch.grace_seconds)
            return run_worker(config, stop, place)
    except BaseException as error:
        failure = Failure.of_error(place.rank, error)
        log = log_path(Path(config.output_dir) / config.name, place.rank)
        logs = str(log) if failure.is_defect and log.exists() else ""
        sys.stderr.write(failure_text([failure], logs=logs) + "\n")
        sys.stderr.flush()
        # A thread may wait for ranks that are gone: it must not keep this one.
        os._exit(failure.exit_code)


@dataclass(frozen=True)
class Attempts:
    """Starts all ranks of a run and waits for their end, as often as asked."""

    config: RunConfig
    stop: StopSignal
    change_run: Callable[["Run", Rank], "Run"] | None = None

    @property
    def _watches_speed(self) -> bool:
        """Whether it is looked for slow ranks. Nobody waits for one that is alone."""
        return self.config.observe.straggler_score > 0 and self.config.launch.num_workers > 1

    def run(self, number: int) -> AttemptEnd:
        """One attempt, from the newest valid checkpoint."""
        import torch

        from launch.meeting import serve_store
        from llmtrain.train.setup import engine_class

        # Asked through the driver's library, a GPU is not initialized by the question: the forked ranks can be.
        os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
        engine_class(self.config.engine.name)
        assert not torch.cuda.is_initialized(), "a GPU cannot be used after a fork"
        run_dir = Path(self.config.output_dir) / self.config.name
        board = PulseBoard(self.config.launch.num_workers, newest_step(run_dir))
        # The port is taken before anybody knows it, and stays with this process: nobody else can get it.
        listener = socket.create_server((LOOPBACK, 0))
        ranks: list[RankProcess] = []
        try:
            for rank in range(self.config.launch.num_workers):
                ranks.append(self._start(rank, number, listener, board))
            store = serve_store(listener)
            look = Stragglers(self.config, board).look if self._watches_speed else lambda: None
            ending = watch(ranks, board, self.stop, self.config.launch, look)
            del store
        finally:
            for rank in ranks:
                rank.end()
        if ending.stacks is not None:
            save_stacks(ending.stacks, stacks_path(run_dir))
        if ending.out_of_time:
            self._abandon_save(run_dir)
        return self._attempt_end(ending, ranks, board)

    def _start(self, rank: int, attempt: int, listener: socket.socket, board: PulseBoard) -> RankProcess:
        world_size = self.config.launch.num_workers
        host, port = listener.getsockname()
        place = Rank(rank, world_size, rank, world_size, host, port, attempt=attempt)
        return start_rank(place, self.stop, listener, self._work(place, board))

    def _work(self, place: Rank, board: PulseBoard) -> Callable[[], int]:
        from launch.worker import run_worker, unchanged

        def work() -> int:
            # All ranks are on this machine: no other network interface, and no name of this machine, is needed.
            if sys.platform == "linux":
                os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
            pulse = board.pulse(place.rank)
            if self._watches_speed:
                from launch.worktime import WorkMeter

                pulse = WorkMeter(
                    pulse, partial(board.add_window, place.rank), partial(board.places_wanted, place.rank)
                )
            return run_worker(self.config, self.stop, place, pulse, self.change_run or unchanged)

        return work

    def _attempt_end(self, ending: Ending, ranks: list[RankProcess], board: PulseBoard) -> AttemptEnd:
        positions = board.positions()
        codes = [rank.process.exitcode or 0 for rank in ranks]
        return AttemptEnd(
            exit_code=EXIT_PREEMPTED if ending.out_of_time else max(codes),
            failures=ending.failures,
            stopped=ending.stopped,
            saved_step=newest_step(Path(self.config.output_dir) / self.config.name),
            step=max(position.step for position in positions),
            worked=any(position.step > position.first_step for position in positions),
            told_to_stop=self.stop.requested,
        )

    def _abandon_save(self, run_dir: Path) -> None:
        """Leave nothing of a save that took longer than there was time for; the checkpoints before it stay."""
        from llmtrain.checkpoint.folders import CHECKPOINTS
        from llmtrain.checkpoint.writer import recover

        message = f"told to stop; not saved within launch.grace_seconds = {self.config.launch.grace_seconds:g}"
        sys.stderr.write(f"{message}: it continues from step {newest_step(run_dir)}\n")
        with suppress(LlmtrainError, OSError), RunFolder(run_dir) as folder:
            recover(run_dir / CHECKPOINTS)
            folder.write_status("preempted", newest_step(run_dir), self.config.total_steps, message)
