"""`python -m tests.distributed.spoiled_command FAULT ARGUMENT...`: the llmtrain command, with a fault on rank 1.

Ranks are forked from the command's process, so what is replaced here is replaced on them.
"""

import sys
import time
from typing import Any

import torch.distributed as dist

from llmtrain import cli
from llmtrain.engines.torch_engine import TorchEngine
from llmtrain.errors import DataError

STEP = 3
train_step = TorchEngine.train_step


def raising(self: TorchEngine, step: int, *rest: Any) -> Any:
    if step == STEP and dist.get_rank() == 1:
        raise ValueError("spoiled on purpose")
    return train_step(self, step, *rest)


def raising_beside_a_sleeper(self: TorchEngine, step: int, *rest: Any) -> Any:
    if step == STEP and dist.get_rank() == 0:
        time.sleep(600)
    return raising(self, step, *rest)


def finding_damage(self: TorchEngine, step: int, *rest: Any) -> Any:
    if step == STEP and dist.get_rank() == 1:
        raise DataError("shard-000007.tar: damaged on purpose")
    return train_step(self, step, *rest)


def crawling(self: TorchEngine, step: int, *rest: Any) -> Any:
    time.sleep(0.5)
    return train_step(self, step, *rest)


FAULTS = {
    "raising": raising,
    "raising_beside_a_sleeper": raising_beside_a_sleeper,
    "finding_damage": finding_damage,
    "crawling": crawling,
}

if __name__ == "__main__":
    TorchEngine.train_step = FAULTS[sys.argv[1]]  # type: ignore[method-assign]
    cli.main(sys.argv[2:])
