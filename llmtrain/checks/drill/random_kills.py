"""A long drill: ranks are killed at random times, again and again, and the run must end as if nothing had happened."""

import math
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path

import psutil

from launch.forking.rank_process import die_with
from llmtrain.checks.drill.single_faults import (
    UNDISTURBED,
    drill_config,
    final_tensors,
    in_fresh_folder,
    leftovers,
    losses,
    run_quietly,
    undisturbed,
)
from llmtrain.config.schema import RunConfig
from llmtrain.runs.audit import iter_events
from llmtrain.runs.metrics_file import METRICS_FILE, iter_rows, read_rows

SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class KillsOutcome:
    """The outcome of a run whose ranks were killed. `useful_share` is the time in steps that count over
    the time of the run (ETTR)."""

    exit_code: int
    kills: int
    restarts: int
    steps: int
    steps_lost: int
    seconds: float
    useful_share: float
    same_weights: bool
    problems: list[str]


def kill_at_random(config: RunConfig, kills: int, mean_seconds: float, seed: int = 0) -> KillsOutcome:
    """Kill a random rank `kills` times, with pauses of half to one and a half times `mean_seconds` between kills."""
    paced = undisturbed(drill_config(config))
    rows = read_rows(paced.with_keys({"name": UNDISTURBED}).run_dir / METRICS_FILE)
    step_seconds = sorted(row["step_seconds"] for row in rows if "step_seconds" in row)[len(rows) // 2]
    steps = max(100, math.ceil(kills * mean_seconds / step_seconds))
    every = max(5, math.ceil(mean_seconds / 10 / step_seconds))
    long = paced.with_keys({"train.steps": steps, "checkpoint.every_steps": every})
    reference = in_fresh_folder(long, UNDISTURBED)
    run_quietly(reference)
    run = in_fresh_folder(long, "killed")
    before = _held()
    began = time.monotonic()
    with _killing(kills, mean_seconds, seed) as killed:
        code = run_quietly(run)
    measured = Measured(killed.value, time.monotonic() - began, sorted(_held() - before))
    return _judge(run, reference, code, measured)


@dataclass(frozen=True)
class Measured:
    """A run whose ranks are killed, seen from outside."""

    kills: int
    seconds: float
    left: list[str]


def _judge(run: RunConfig, reference: RunConfig, code: int, measured: Measured) -> KillsOutcome:
    folder, other = run.run_dir, reference.run_dir
    problems = [] if code == 0 else [f"ended with {code}, not 0"]
    same = code == 0 and final_tensors(folder) == final_tensors(other) and losses(folder) == losses(other)
    if not same:
        problems.append("weights or losses are not those of the undisturbed run")
    problems += [f"left behind: {what}" for what in (*map(str, leftovers(folder)), *measured.left)]
    done = [row for row in iter_rows(folder / METRICS_FILE) if "loss" in row]
    counted = [row for row in read_rows(folder / METRICS_FILE) if "loss" in row]
    return KillsOutcome(
        exit_code=code,
        kills=measured.kills,
        restarts=len(list(iter_events(folder, "restarting"))),
        steps=len(counted),
        steps_lost=len(done) - len(counted),
        seconds=measured.seconds,
        useful_share=sum(row["step_seconds"] for row in counted) / measured.seconds,
        same_weights=same,
        problems=problems,
    )


@contextmanager
def _killing(kills: int, mean_seconds: float, seed: int) -> Iterator["Synchronized[int]"]:
    """A process that kills ranks, children of this one's children, and counts them, until the context ends."""
    count = multiprocessing.get_context("fork").Value("i", 0)
    drill = os.getpid()

    def life() -> None:
        die_with(drill)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a keyboard tells the drill
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        chance = random.Random(seed)
        while count.value < kills:
            time.sleep(mean_seconds * chance.uniform(0.5, 1.5))
            launchers = [child for child in psutil.Process(drill).children() if child.pid != os.getpid()]
            with suppress(psutil.NoSuchProcess):
                ranks = [rank for launcher in launchers for rank in launcher.children()]
                if not ranks:
                    continue
                chance.choice(ranks).kill()
                count.value += 1
        os._exit(0)  # a fork of the command, whose end is not its own

    process = multiprocessing.get_context("fork").Process(target=life, name="killer", daemon=True)
    process.start()
    try:
        yield count
    finally:
        process.kill()
        process.join()


def _held() -> set[str]:
    """All that this process and its children hold: processes, listening ports, shared memory."""
    here = psutil.Process()
    ports = [connection for connection in here.net_connections("inet") if connection.status == psutil.CONN_LISTEN]
    shared = map(str, SHARED_MEMORY.iterdir()) if SHARED_MEMORY.is_dir() else ()
    children = [f"process {child.pid}" for child in here.children(recursive=True)]
    return {*children, *shared, *(f"port {connection.laddr.port}" for connection in ports)}
