"""`python -m tests.distributed.spoiled_command FAULT ARGUMENT...`: the llmtrain command, with a fault on a rank.

Ranks are forked from the command's process, so what is replaced here is replaced on them.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist

from llmtrain import cli
from llmtrain.engines.torch_engine import TorchEngine
from llmtrain.errors import DataError
from llmtrain.runs.folder import LOCK
from tests.support.run_files import contents

STEP = 3
TAKEN_OVER_AT = 12
train_step = TorchEngine.train_step


def raising(self: TorchEngine, step: int, *rest: Any) -> Any:
    if step == STEP and dist.get_rank() == 1:
        raise ValueError("spoiled on purpose")
    return train_step(self, step, *rest)


def raising_beside_a_sleeper(self: TorchEngine, step: int, *rest: Any) -> Any:
    if step == STEP and dist.get_rank() == 0:
        time.sleep(600)
    return raising(self, step, *rest)


def hanging(self: TorchEngine, step: int, *rest: Any) -> Any:
    if step == STEP and (not dist.is_initialized() or dist.get_rank() == 1):
        Path("hanging").touch()
        time.sleep(600)
    return train_step(self, step, *rest)


def finding_damage(self: TorchEngine, step: int, *rest: Any) -> Any:
    if step == STEP and dist.get_rank() == 1:
        raise DataError("shard-000007.tar: damaged on purpose")
    return train_step(self, step, *rest)


def crawling(self: TorchEngine, step: int, *rest: Any) -> Any:
    time.sleep(0.5)
    return train_step(self, step, *rest)


def losing_the_folder(self: TorchEngine, step: int, *rest: Any) -> Any:
    """Another process takes the folder over while rank 0 is at a step, and `taken_over.json` says what it has found."""
    if step == TAKEN_OVER_AT and (not dist.is_initialized() or dist.get_rank() == 0):
        run = Path("runs/tiny")
        lock = json.loads((run / LOCK).read_text("utf-8"))
        (run / LOCK).write_text(json.dumps({**lock, "token": "other", "host": "elsewhere", "pid": 4242}), "utf-8")
        Path("taken_over.json").write_text(json.dumps(contents(run)), "utf-8")
    return train_step(self, step, *rest)


FAULTS = {
    "raising": raising,
    "raising_beside_a_sleeper": raising_beside_a_sleeper,
    "hanging": hanging,
    "finding_damage": finding_damage,
    "crawling": crawling,
    "losing_the_folder": losing_the_folder,
}

if __name__ == "__main__":
    TorchEngine.train_step = FAULTS[sys.argv[1]]  # type: ignore[method-assign]
    cli.main(sys.argv[2:])
