"""Faults that a drill injects into a run, for real: processes killed, files damaged, limits of the system lowered."""

import os
import resource
import signal
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any, Literal, cast

import psutil
import torch

from launch.rank.place import Rank
from llmtrain.checkpoint.folders import CHECKPOINTS, checkpoint_steps, step_folder_name
from llmtrain.config.schema import RunConfig
from llmtrain.runs.audit import iter_events
from llmtrain.train.loop import Run
from llmtrain.values.batch import Batch
from llmtrain.values.progress import StepResult

INJECTED = "injected"
"""The file in the run folder that says when a fault was first injected, in seconds since the epoch."""

SMALLEST_FILE_BYTES = 64 << 10
"""The largest file on a disk that is called full: metrics and logs of a drill fit, tensors do not."""

HANG_SECONDS = 3600.0

SLOW = "observe.straggler_score"
LEAST_SLOWDOWN_SECONDS = 0.1
"""How much longer a step of a slow rank takes at least."""

POLL_SECONDS = 0.02


@dataclass(frozen=True)
class Target:
    """The run that a fault strikes: its folder, and the process of its launcher."""

    run_dir: Path
    launcher: int

    @property
    def checkpoints(self) -> Path:
        return self.run_dir / CHECKPOINTS


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong on one rank: the last, or the first, which has the run folder.

    It strikes once, unless it is `lasting`: at the beginning of a step, while the batches of a step are waited for, or
    when a checkpoint is about to become visible. `expected` is how the run must end: it recovers by itself; it stops
    with exit code 75, and the same command continues it; it is given up with 93. `lr_factor` is what it does to the
    learning rate of its step; from its step on, each takes `slowdown` median steps longer. `notice` is the audit log's
    event that must follow; empty where the command ends and its exit code tells. `keys` are settings that its drill
    needs, `least_ranks` ranks.
    """

    name: str
    strike: Callable[[Target], object]
    where: Literal["step", "data", "publish"] = "step"
    on_first_rank: bool = False
    lasting: bool = False
    expected: Literal["recovers", "preempted", "given up"] = "recovers"
    same_weights: bool = True
    lr_factor: float = 1.0
    slowdown: float = 0.0
    notice: str = "restarting"
    least_ranks: int = 1
    keys: Mapping[str, object] = field(default_factory=dict)


def kill(target: Target) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stop(target: Target) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def hang(target: Target) -> None:
    time.sleep(HANG_SECONDS)


def fail(target: Target) -> None:
    raise RuntimeError("injected by a drill")


def exhaust_memory(target: Target) -> None:
    """No more address space than this process has now."""
    size_bytes = psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (size_bytes, size_bytes))
    torch.zeros(size_bytes, dtype=torch.uint8)


def tell_to_stop(target: Target) -> None:
    os.kill(target.launcher, signal.SIGTERM)


def tell_to_stop_in_a_slow_save(target: Target) -> None:
    """The grace is over before the save is."""
    tell_to_stop(target)
    hang(target)


def damage_newest_checkpoint_and_die(target: Target) -> None:
    # The save before this step may still be written; the one before that is what the run goes back to.
    while len(checkpoint_steps(target.checkpoints)) < 2:
        time.sleep(POLL_SECONDS)
    newest = target.checkpoints / step_folder_name(checkpoint_steps(target.checkpoints)[0])
    largest = max(newest.iterdir(), key=lambda file: file.stat().st_size)
    with largest.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))
    kill(target)


def fill_disk(target: Target) -> None:
    """Files of this process cannot grow beyond a small size until a save has failed."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (SMALLEST_FILE_BYTES, before[1]))

    def free_space() -> None:
        while not any(iter_events(target.run_dir, "save_failed")):
            time.sleep(POLL_SECONDS)
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

    threading.Thread(target=free_space, daemon=True).start()


def nothing(target: Target) -> None:
    """The fault is in the steps themselves."""


FAULTS = (
    Fault("rank killed in a step", kill),
    Fault("rank killed while a checkpoint is written", kill, where="publish", on_first_rank=True),
    Fault("newest checkpoint damaged", damage_newest_checkpoint_and_die, notice="set_aside"),
    Fault("rank raises an error", fail),
    Fault("memory runs out on a rank", exhaust_memory),
    Fault("rank stopped (SIGSTOP)", stop),
    Fault("data loader hangs", hang, where="data"),
    Fault("slow rank", nothing, slowdown=2.0, notice="straggler", least_ranks=2, keys={SLOW: 0.7}),
    Fault("told to stop", tell_to_stop, expected="preempted", notice=""),
    Fault(
        "told to stop, save slower than the grace",
        tell_to_stop_in_a_slow_save,
        where="publish",
        on_first_rank=True,
        expected="preempted",
        notice="",
        keys={"launch.grace_seconds": 1.0},
    ),
    Fault("disk full", fill_disk, on_first_rank=True, notice="save_failed"),
    Fault(
        "weights destroyed",
        nothing,
        same_weights=False,
        lr_factor=1e30,
        notice="rollback",
        keys={"health.rollback": True, "health.max_strikes": 2},
    ),
    Fault("same step fails every time", fail, lasting=True, expected="given up", notice="stalled"),
)
"""In the order in which a drill goes through them."""


def inject(fault: Fault, config: RunConfig, step: int) -> Callable[[Run, Rank], Run]:
    """A change of a run that injects a fault at a step. One that strikes a save spares the very first."""
    run_dir = config.run_dir
    target = Target(run_dir, os.getpid())
    injected = run_dir / INJECTED
    target_rank = 0 if fault.on_first_rank else config.launch.num_workers - 1

    def change_run(run: Run, place: Rank) -> Run:
        # A learning rate is everybody's: the ranks would not hold the same weights otherwise.
        spared = place.rank != target_rank and fault.lr_factor == 1.0
        if spared or (injected.exists() and not fault.lasting):
            return run
        strike = _Once(fault, target, injected)
        if fault.where == "publish":
            return replace(run, saving=replace(run.saving, before_publish=_faulty_publish(run, strike, target)))
        if fault.where == "data":
            return replace(run, loader=cast(Any, _FaultyLoader(run.loader, strike, step - run.state.step)))
        return replace(run, engine=cast(Any, _FaultyEngine(run.engine, strike, step, fault)))

    return change_run


class _Once:
    """Lets a fault strike, once in this process; says whether it struck now."""

    def __init__(self, fault: Fault, target: Target, injected: Path) -> None:
        self._fault, self._target, self._injected = fault, target, injected
        self._done = False

    def __call__(self) -> bool:
        if self._done:
            return False
        self._done = True
        if not self._injected.exists():
            self._injected.write_text(repr(time.time()), "utf-8")
        self._fault.strike(self._target)
        return True


def _faulty_publish(run: Run, strike: Callable[[], bool], target: Target) -> Callable[[], object]:
    def before_publish() -> object:
        if checkpoint_steps(target.checkpoints):
            strike()
        return run.saving.before_publish()

    return before_publish


class _Stand:
    """Stands in for a part of a run; what it does not have is the part's."""

    def __init__(self, part: Any) -> None:
        self._part = part

    def __getattr__(self, name: str) -> Any:
        return getattr(self._part, name)


class _FaultyEngine(_Stand):
    def __init__(self, part: Any, strike: Callable[[], bool], step: int, fault: Fault) -> None:
        super().__init__(part)
        self._strike, self._step, self._fault = strike, step, fault
        self._step_seconds: list[float] = []

    def train_step(self, step: int, micro_batches: Sequence[Batch], lr: float) -> StepResult:
        if step == self._step and self._strike():
            lr *= self._fault.lr_factor
        if step >= self._step and self._fault.slowdown:
            time.sleep(max(LEAST_SLOWDOWN_SECONDS, self._fault.slowdown * median(self._step_seconds)))
        began = time.perf_counter()
        result = self._part.train_step(step, micro_batches, lr)
        self._step_seconds.append(time.perf_counter() - began)
        return result


class _FaultyLoader(_Stand):
    def __init__(self, part: Any, strike: Callable[[], bool], steps_ahead: int) -> None:
        super().__init__(part)
        self._strike, self._steps_ahead = strike, steps_ahead

    def steps(self, first_sample: int, first_step: int) -> Generator[list[Batch], None, None]:
        for number, micro_batches in enumerate(self._part.steps(first_sample, first_step), start=1):
            if number == self._steps_ahead:
                self._strike()
            yield micro_batches
