"""Hangs: when to give up waiting for ranks without progress, and which rank the others wait for."""

import faulthandler
import logging
import os
import re
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from launch.rank.signals import Position
from llmtrain.config.launch import WatchdogConfig
from llmtrain.files import open_log
from llmtrain.runs.rank_logs import LOGS

STACKS = "stacks.txt"

_logger = logging.getLogger(__name__)

DUMP_SIGNAL = signal.SIGUSR2
"""Tells a rank to write what its threads are doing."""

STOPPED = "its process is stopped (SIGSTOP)"

DUMP_SECONDS = 1.0
"""Time for ranks to write their stacks. One that is stopped never does."""

_WAITING = re.compile(r"/torch/distributed/|/torch/autograd/graph\.py|/deepspeed/comm/|/launch/rank/rendezvous\.py")
"""Files whose functions wait for other ranks. Autograd is among them: collectives of a backward pass run below it."""

_CURRENT_FRAME = re.compile(r'^  File "([^"]*)", line (\d+) in (\S+)', re.MULTILINE)


@dataclass(frozen=True)
class Suspect:
    """A rank that the others wait for: how that is known, and where its main thread is, if it said."""

    rank: int
    position: Position
    reason: str
    place: str = ""


def is_stuck(positions: Sequence[Position], limits: WatchdogConfig, now: float) -> bool:
    """True where every rank has been at its position for longer than its limit.

    One that is not late excuses the others: they wait for it.
    """
    return all(now - position.since > limit_seconds(position, limits) for position in positions)


def limit_seconds(position: Position, limits: WatchdogConfig) -> float:
    """The longest time at a position, in seconds."""
    return getattr(limits, f"{position.phase}_seconds")


def find_suspects(
    positions: Mapping[int, Position], helpless: Mapping[int, str], stacks: Mapping[int, str]
) -> list[Suspect]:
    """The ranks that are the reason of a hang, most telling sign first. Never empty.

    One that is `helpless`, with the reason (its process is stopped, or cannot be reached); a rank with fewer finished
    steps than others; one that is at work on its own (data, evaluation, a checkpoint) while others are in the step; one
    whose stack waits for nobody. Where nothing tells them apart, all.
    """

    def suspects(ranks: Sequence[int], reason: str) -> list[Suspect]:
        return [Suspect(rank, positions[rank], reason, current_place(stacks.get(rank, ""))) for rank in ranks]

    # Each sign excludes the ones after it: a rank that is behind makes all others wait, whatever their stacks say.
    if helpless:
        return [suspect for rank, reason in helpless.items() for suspect in suspects([rank], reason)]
    furthest = max(position.step for position in positions.values())
    behind = [rank for rank, position in positions.items() if position.step < furthest]
    if behind:
        return suspects(behind, f"it has finished fewer steps than the others, who have {furthest}")
    apart = [rank for rank, position in positions.items() if position.phase not in ("step", "setup")]
    if apart and len(apart) < len(positions):
        return suspects(apart, "the others wait for it in the step")
    busy = [rank for rank, stack in stacks.items() if stack and not waits_for_others(stack)]
    if busy:
        return suspects(busy, "it waits for no other rank")
    return suspects(list(positions), "nothing tells the ranks apart")


def waits_for_others(stack: str) -> bool:
    """True where the main thread of a dumped stack is in a collective."""
    frame = _CURRENT_FRAME.search(main_thread(stack))
    return frame is not None and _WAITING.search(frame[1]) is not None


def current_place(stack: str) -> str:
    """The place of the main thread of a dumped stack: `function (file:line)`; empty where there is no stack."""
    frame = _CURRENT_FRAME.search(main_thread(stack))
    return f"{frame[3]} ({Path(frame[1]).name}:{frame[2]})" if frame else ""


def main_thread(stack: str) -> str:
    """The main thread's part of faulthandler's dump: signals interrupt the main thread, which is called current."""
    return stack[stack.rfind("Current thread") :] if "Current thread" in stack else stack


def dump_on_signal(descriptor: int) -> None:
    """Let this process write the stacks of its threads to a descriptor whenever DUMP_SIGNAL comes.

    The handler is C: it runs although the interpreter is inside a collective that never ends.
    """
    faulthandler.register(DUMP_SIGNAL, file=descriptor, all_threads=True)


def read_stacks(ranks: Mapping[int, tuple[int, int]]) -> dict[int, str]:
    """Tell ranks to dump their stacks and read them. Each has a process and the descriptor of its pipe."""
    for process, descriptor in ranks.values():
        os.set_blocking(descriptor, False)  # a stopped rank writes nothing, and must not stop its launcher
        os.kill(process, DUMP_SIGNAL)
    stacks = dict.fromkeys(ranks, b"")
    deadline = time.monotonic() + DUMP_SECONDS
    while time.monotonic() < deadline:
        time.sleep(DUMP_SECONDS / 20)
        for rank, (_, descriptor) in ranks.items():
            try:
                stacks[rank] += os.read(descriptor, 1 << 20)
            except BlockingIOError:
                continue
    return {rank: stack.decode("utf-8", "replace") for rank, stack in stacks.items()}


def stopped_processes(processes: Mapping[int, int]) -> dict[int, str]:
    """The ranks whose process somebody has stopped (SIGSTOP, a debugger, a frozen container), with that as reason."""
    stopped = {}
    for rank, process in processes.items():
        try:
            if psutil.Process(process).status() in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP):
                stopped[rank] = STOPPED
        except psutil.Error:
            continue
    return stopped


def save_stacks(stacks: Mapping[int, str], run_dir: Path) -> None:
    """Append the dumped stacks of hung ranks to a file among the run's logs, by rank."""
    path = run_dir / LOGS / STACKS
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open_log(path) as file:
            for rank, stack in stacks.items():
                file.write(f"=== rank {rank}\n{stack or 'said nothing: its process is stopped'}\n")
    except OSError as error:
        _logger.warning("%s: the stacks cannot be written: %s", path, error.strerror)
