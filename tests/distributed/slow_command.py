"""`python -m tests.distributed.slow_command WHERE STEP SECONDS ARGUMENT...`: the llmtrain command, its last rank slow.

From step STEP on it sleeps for SECONDS in every step: in the forward pass of the first layer that it has, or in the
thread that prepares its batches, or `nowhere`. With `forward-unmeasured`, waiting counts as work too. Ranks are forked
from the command's process, so what is replaced here is replaced on them.
"""

import sys
import time
from typing import Any

import torch.distributed as dist

from launch.supervision.work_meter import WorkMeter
from llmtrain import cli
from llmtrain.data.loader import BatchLoader
from llmtrain.models.pointwise import MLP
from llmtrain.observe.monitor import Monitor

WHERE, STEP, SECONDS = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
finish_step, forward, prepare = Monitor.step, MLP.forward, BatchLoader._step
finished = slept_in = 0


def count_step(self: Monitor, step: int, *rest: Any) -> None:
    global finished
    finished = step
    finish_step(self, step, *rest)


def is_due() -> bool:
    """Whether this rank should sleep now; true once in each step."""
    global slept_in
    if dist.get_rank() < dist.get_world_size() - 1 or finished + 1 < STEP or slept_in > finished:
        return False
    slept_in = finished + 1
    return True


def slow_forward(self: MLP, *inputs: Any) -> Any:
    if is_due():
        time.sleep(SECONDS)
    return forward(self, *inputs)


def slow_preparation(self: BatchLoader, step: int, first_sample: int) -> Any:
    if is_due():
        time.sleep(SECONDS)
    return prepare(self, step, first_sample)


if __name__ == "__main__":
    Monitor.step = count_step  # type: ignore[method-assign]
    if WHERE.startswith("forward"):
        MLP.forward = slow_forward  # type: ignore[method-assign]
    elif WHERE == "data":
        BatchLoader._step = slow_preparation
    if WHERE.endswith("unmeasured"):
        WorkMeter._measure_waiting = lambda self: None
    cli.main(sys.argv[4:])
