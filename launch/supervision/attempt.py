"""One attempt to bring a run to its end: what a launcher prepares, what a rank does, and what it has come to."""

import gc
import logging
import os
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from launch.rank.heartbeat import HeartbeatBoard
from launch.rank.log import stacks_path
from launch.rank.place import Rank
from launch.rank.stop import StopSignal
from launch.supervision.hangs import save_stacks
from launch.supervision.restarts import AttemptEnd, newest_step
from launch.supervision.watch import Ending
from llmtrain.config.schema import RunConfig
from llmtrain.errors import EXIT_PREEMPTED, LlmtrainError
from llmtrain.messages import show_messages
from llmtrain.runs.folder import RunFolder, read_status

_logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from llmtrain.train.loop import Run

ChangeRun = Callable[["Run", Rank], "Run"]
"""Replaces parts of a run on a rank, as a drill does."""


def watches_speed(config: RunConfig) -> bool:
    """Whether it is looked for slow ranks. Nobody waits for one that is alone."""
    return config.observe.straggler_score > 0 and config.launch.num_workers > 1


def import_for_ranks(engine: str) -> None:
    """Import all that ranks need, in the process that they will be forked from. No GPU may be in use there."""
    import torch
    import torch._dynamo  # every optimizer's first step would, on each rank for seconds

    import launch.rank.worker
    import launch.supervision.work_meter
    from llmtrain.train.setup import engine_class

    assert launch.rank.worker and launch.supervision.work_meter and torch._dynamo
    # Asked through the driver's library, a GPU is not initialized by the question: the forked ranks can be.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    engine_class(engine)
    assert not torch.cuda.is_initialized(), "a GPU cannot be used after a fork"
    gc.freeze()  # ranks' garbage collections pass over what is imported: half a second each, and a copy of its pages


def rank_work(
    config: RunConfig,
    stop: StopSignal,
    place: Rank,
    board: HeartbeatBoard,
    slot: int,
    change_run: ChangeRun | None = None,
) -> Callable[[], int]:
    """What a forked rank does; it returns the exit code. The rank tells where it is in this slot of the board.

    It reads the data's manifests itself: they may have changed since the launcher did, or since the last attempt.
    """
    from launch.rank.worker import run_worker, unchanged
    from llmtrain.preflight.resolve import resolve

    def work() -> int:
        show_messages(place.rank)
        heartbeat = board.heartbeat(slot)
        if watches_speed(config):
            from launch.supervision.work_meter import WorkMeter

            heartbeat = WorkMeter(heartbeat, partial(board.add_window, slot), partial(board.places_wanted, slot))
        return run_worker(resolve(config), stop, place, heartbeat, change_run or unchanged)

    return work


def sum_up(config: RunConfig, ending: Ending, board: HeartbeatBoard, stop: StopSignal) -> AttemptEnd:
    """What an attempt has come to, none of its ranks being left: for `supervise`, and on storage."""
    run_dir = config.run_dir
    if ending.stacks is not None:
        save_stacks(ending.stacks, stacks_path(run_dir))
    if ending.out_of_time:
        _abandon_save(config, run_dir)
    positions = board.positions()
    return AttemptEnd(
        exit_code=EXIT_PREEMPTED if ending.out_of_time else ending.exit_code,
        failures=ending.failures,
        stopped=ending.stopped,
        saved_step=newest_step(run_dir),
        step=max(position.step for position in positions),
        worked=any(position.step > position.first_step for position in positions),
        told_to_stop=stop.requested,
    )


def note_stop(config: RunConfig, launch_id: str) -> None:
    """Say in status.json that a run was told to stop while none of its ranks was there to say it."""
    run_dir = config.run_dir
    with suppress(LlmtrainError, OSError):
        before = read_status(run_dir)
        if before is not None:
            with RunFolder(run_dir, before.attempt, launch_id) as folder:
                message = "told to stop; the same command continues"
                folder.write_status("preempted", before.step, config.train.steps or before.total_steps, message)


def _abandon_save(config: RunConfig, run_dir: Path) -> None:
    """Leave nothing of a save that took longer than there was time for; the checkpoints before it stay."""
    from llmtrain.checkpoint.folders import CHECKPOINTS
    from llmtrain.checkpoint.writer import recover

    message = f"told to stop; not saved within launch.grace_seconds = {config.launch.grace_seconds:g}"
    _logger.info("%s: it continues from step %d", message, newest_step(run_dir))
    with suppress(LlmtrainError, OSError), RunFolder(run_dir) as folder:
        recover(run_dir / CHECKPOINTS)
        before = read_status(run_dir)
        total_steps = config.train.steps or (before.total_steps if before else config.total_steps)
        folder.write_status("preempted", newest_step(run_dir), total_steps, message)
