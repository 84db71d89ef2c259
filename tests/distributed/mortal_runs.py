"""`python -m tests.distributed.mortal_runs JOB.json`: runs of `llmtrain train` that are killed, and continued.

A job names the configuration, overrides, phase, rank, and where in the phase to kill: numbers from 0 to 1. For each
there is a run of its own, killed there once by SIGKILL and then continued by the same command. One line of JSON is
printed per run. PyTorch is imported once: each command is forked from here, before anything is computed.
"""

import json
import multiprocessing
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmtrain.checkpoint.manager import CheckpointManager
from llmtrain.cli import main
from llmtrain.train.setup import engine_class
from tests.support.mortality import die_at, in_child, on_file_operations, only_within

PHASES = {"write": ("_write", "_write_part"), "remove": ("_remove_old",)}
"""Methods of the manager; what `remove` does is a part of what `write` does."""


def command(arguments: list[str], phase: str, rank: int, tell: Callable[..., object] = lambda *_: None) -> int:
    """Run llmtrain in a process of its own, `tell` called before each file operation of a phase on one rank."""

    def child() -> None:
        def on_rank(*args: Any) -> None:
            if alone or multiprocessing.current_process().name == f"rank-{rank}":
                tell(*args)

        alone = "launch.num_workers=1" in arguments
        on_file_operations(only_within(CheckpointManager, PHASES[phase], on_rank))
        output = os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        try:
            main(arguments)
        except SystemExit as end:
            sys.stdout.flush()
            os._exit(end.code if isinstance(end.code, int) else 1)

    return in_child(child)


def count(arguments: list[str], phase: str, rank: int) -> int:
    """File operations of the phase in an undisturbed run, which becomes the one to compare with."""
    log = os.open("operations", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    write = os.write
    code = command([*arguments, "name=whole"], phase, rank, lambda name, _: write(log, name.encode() + b"\n"))
    os.close(log)
    assert code == 0, Path("output.txt").read_text()
    return len(Path("operations").read_text().splitlines())


def run_job(job: dict[str, Any]) -> None:
    arguments = ["train", "run.yaml", *job["overrides"]]
    for engine in ("torch", "megatron"):
        engine_class(engine)
    total = count(arguments, job["phase"], job["rank"])
    for number, place in enumerate(job["places"]):
        name, at = f"killed-{number}", 1 + min(int(place * total), total - 1)
        killed = command([*arguments, f"name={name}"], job["phase"], job["rank"], die_at(at))
        checkpoints = Path("runs", name, "checkpoints")  # a run that died at its start has not made it
        left = sorted(entry.name for entry in checkpoints.iterdir()) if checkpoints.exists() else []
        continued = command([*arguments, f"name={name}"], job["phase"], job["rank"])
        print(json.dumps({"name": name, "at": at, "killed": killed, "left": left, "continued": continued}), flush=True)


if __name__ == "__main__":
    run_job(json.loads(Path(sys.argv[1]).read_bytes()))
