"""Does a run survive? Faults are injected into short runs of a configuration, and what follows is measured."""

import math
import multiprocessing
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil

from launch.forking.rank_process import die_with
from launch.local import launch
from launch.supervision.attempt import import_for_ranks
from llmtrain.checkpoint.folders import CHECKPOINTS, checkpoint_steps, step_folder_name
from llmtrain.checkpoint.manifest import load_manifest
from llmtrain.checks.drill.faults import INJECTED, Fault, inject
from llmtrain.config.schema import RunConfig
from llmtrain.errors import EXIT_PREEMPTED, LlmtrainError, NoProgressError
from llmtrain.preflight.resolve import resolve
from llmtrain.runs.audit import AUDIT_FILE, iter_events
from llmtrain.runs.metrics_file import METRICS_FILE, iter_rows, read_rows
from llmtrain.runs.status import read_status

STEPS = 30
SAVE_EVERY = 5
FAULT_STEP = 13
"""The step of a fault: between two checkpoints, and after the first."""

UNDISTURBED = "undisturbed"
"""The name of the run without a fault."""

LONGEST_STEP_FACTOR = 5.0
LEAST_WATCHDOG_SECONDS = 3.0
"""Ranks count as hanging after so many of the undisturbed run's longest steps, and not before so many seconds."""

REACTIONS = ("restarting", "stalled", "save_failed", "rollback", "straggler")
"""The audit log's events that say that a fault was noticed."""


@dataclass(frozen=True)
class Outcome:
    """All that followed a fault. Seconds count from the moment at which it struck; None where there is no such moment.

    `detected_seconds` until it was noticed, `back_seconds` until the next step was finished after that.
    `problems` says what did not go as it must.
    """

    fault: str
    exit_codes: list[int]
    detected_seconds: float | None
    back_seconds: float | None
    steps_lost: int
    same_weights: bool | None
    cause: str
    problems: list[str]


def drill_config(config: RunConfig, steps: int = STEPS) -> RunConfig:
    """The configuration, shortened: few steps, a checkpoint every few of them, nothing that leaves the machine."""
    return config.with_keys(
        {
            "output_dir": f"{config.run_dir}-drill",
            "train.steps": steps,
            "train.tokens": None,
            "train.epochs": None,
            "train.deterministic": True,  # runs are compared bit for bit
            "checkpoint.every_steps": SAVE_EVERY,
            "checkpoint.keep": 3,
            "checkpoint.keep_every_steps": 0,
            "checkpoint.resume": "auto",
            "observe.wandb": "off",
            "observe.tensorboard": False,
            "observe.log_every_steps": 1,
        }
    )


def in_fresh_folder(config: RunConfig, name: str) -> RunConfig:
    """The same run in a folder of its own, without what an earlier drill left there."""
    run = config.with_keys({"name": "".join(letter if letter.isalnum() else "-" for letter in name)})
    shutil.rmtree(run.run_dir, ignore_errors=True)
    return run


def run_quietly(config: RunConfig, fault: Fault | None = None) -> int:
    """Run a configuration, perhaps with a fault, what it prints going to `output.txt` in its folder; the exit code.

    Its launcher is a process in a session of its own: what the drill is told to do it does not hear, and what a fault
    tells it the drill does not. Whatever ends the drill ends the launcher and its ranks too.
    """
    import_for_ranks(config.engine.name)
    drill = os.getpid()

    def life() -> None:
        os.setsid()
        die_with(drill)
        # A fork of the command: what that does at its own end is not to be done here.
        os._exit(_launched(config, fault))

    process = multiprocessing.get_context("fork").Process(target=life, name="launcher")
    process.start()
    try:
        process.join()
    finally:
        if process.is_alive():
            end_session(process)
    assert process.exitcode is not None
    return process.exitcode


def _launched(config: RunConfig, fault: Fault | None) -> int:
    folder = config.run_dir
    folder.mkdir(parents=True, exist_ok=True)
    with printed_to(folder / "output.txt"):
        try:
            return launch(resolve(config), inject(fault, config, FAULT_STEP) if fault else None)
        except LlmtrainError as error:
            print(f"error: {error}", file=sys.stderr)
            return error.exit_code
        except Exception:
            traceback.print_exc()
            return 1


def end_session(process: BaseProcess) -> None:
    """Kill a process and all that is in its session, ranks that are stopped too."""
    # Before the kill: ranks whose launcher is gone are nobody's children any more.
    ranks = psutil.Process(process.pid).children(recursive=True)
    with suppress(ProcessLookupError):  # it may not have got so far as to have a session
        os.killpg(process.pid or 0, signal.SIGKILL)
    process.kill()
    process.join()
    psutil.wait_procs(ranks)


@contextmanager
def printed_to(path: Path) -> Iterator[None]:
    """Let what this process and its children print go to a file."""
    before = []
    with path.open("a", encoding="utf-8") as file:
        # What is buffered belongs to the stream as it is now.
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        for number in (1, 2):
            before.append((number, os.dup(number)))
            os.dup2(file.fileno(), number)
        try:
            yield
        finally:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            for number, old in before:
                os.dup2(old, number)
                os.close(old)


def undisturbed(config: RunConfig) -> RunConfig:
    """Run without a fault; returns the configuration with a watchdog that fits the steps of this machine.

    Raises LlmtrainError where even that does not succeed.
    """
    reference = in_fresh_folder(config, UNDISTURBED)
    code = run_quietly(reference)
    if code:
        status = read_status(reference.run_dir)
        cause = f" ({status.cause})" if status and status.cause else ""
        output = reference.run_dir / "output.txt"
        raise LlmtrainError(f"the undisturbed run ended with {code}{cause}: {output} says more.")
    rows = read_rows(reference.run_dir / METRICS_FILE)
    longest = max(row["step_seconds"] for row in rows if "step_seconds" in row)
    seconds = max(LEAST_WATCHDOG_SECONDS, LONGEST_STEP_FACTOR * longest)
    return config.with_keys(dict.fromkeys(("launch.watchdog.step_seconds", "launch.watchdog.data_seconds"), seconds))


def try_fault(config: RunConfig, fault: Fault) -> Outcome:
    """Run with a fault, start it again where it asks for that, and say what followed. After `undisturbed`."""
    run = in_fresh_folder(config.with_keys(fault.keys), fault.name)
    ends = [(run_quietly(run, fault), time.time())]
    if ends[0][0] == EXIT_PREEMPTED:
        ends.append((run_quietly(run, fault), time.time()))
    return judge(fault, run.run_dir, ends, config.with_keys({"name": UNDISTURBED}).run_dir)


def judge(fault: Fault, folder: Path, ends: list[tuple[int, float]], reference: Path) -> Outcome:
    """Compare what followed a fault with what must follow. `ends` are exit codes and times of the command's runs."""
    codes = [code for code, _ in ends]
    wanted = {"recovers": [0], "preempted": [EXIT_PREEMPTED, 0], "given up": [NoProgressError.exit_code]}
    problems = []
    if codes != wanted[fault.expected]:
        problems.append(f"ended with {codes}, not {wanted[fault.expected]}")
    if not (folder / INJECTED).exists():
        problems.append("the fault did not strike")
    struck = float((folder / INJECTED).read_text()) if (folder / INJECTED).exists() else math.inf
    same = None
    if codes[-1] == 0:
        same = final_tensors(folder) == final_tensors(reference)
        if fault.same_weights and not same:
            problems.append("the weights are not those of the undisturbed run")
        if not all(math.isfinite(loss) for loss in losses(folder).values()):
            problems.append("a loss is not finite")
        if fault.same_weights and losses(folder) != losses(reference):
            problems.append("the losses are not those of the undisturbed run")
    if fault.notice and not any(iter_events(folder, fault.notice)):
        problems.append(f"no {fault.notice} in {AUDIT_FILE}")
    problems += [f"left behind: {path.name}" for path in leftovers(folder)]
    detected, back = reaction(folder, struck, [time for _, time in ends])
    status = read_status(folder)
    cause = next((event["cause"] for event in iter_events(folder) if "cause" in event), "")
    return Outcome(
        fault=fault.name,
        exit_codes=codes,
        detected_seconds=detected,
        back_seconds=back,
        steps_lost=steps_lost(folder),
        same_weights=same,
        cause=cause or (status.cause if status else ""),
        problems=problems,
    )


def final_tensors(folder: Path) -> dict[str, str]:
    """The hashes of the newest checkpoint's tensor files. Equal in runs of one layout whose tensors are equal."""
    checkpoints = folder / CHECKPOINTS
    newest = checkpoint_steps(checkpoints)[0]
    files = load_manifest(checkpoints / step_folder_name(newest)).files
    return {f"{newest}/{name}": entry.sha256 for name, entry in files.items() if name.endswith(".safetensors")}


def losses(folder: Path) -> dict[int, float]:
    """The loss of each step that counts."""
    return {row["step"]: row["loss"] for row in read_rows(folder / METRICS_FILE) if "loss" in row}


def steps_lost(folder: Path) -> int:
    """How many finished steps had to be done again."""
    steps = [row["step"] for row in iter_rows(folder / METRICS_FILE) if "loss" in row]
    return sum(max(0, before - after + 1) for before, after in pairwise(steps))


def leftovers(folder: Path) -> list[Path]:
    """Half checkpoints and locks, which no run may leave."""
    inside = [*folder.glob(f"{CHECKPOINTS}/*"), *folder.glob("*.lock")]
    return [path for path in inside if path.name.startswith(("writing-", "removing-", "replaced-")) or path.is_file()]


def reaction(folder: Path, struck: float, ends: Sequence[float]) -> tuple[float | None, float | None]:
    """Seconds from the fault until it was noticed, and until a step was finished after that.

    Where the command ended and was run again, it was noticed when it ended.
    """
    noticed = list(ends[:-1]) or [
        datetime.fromisoformat(event["time"]).timestamp() for event in iter_events(folder, *REACTIONS)
    ]
    rows = [row["time"] for row in iter_rows(folder / METRICS_FILE) if "loss" in row]
    detected = next((time for time in noticed if time >= struck - 0.01), None)
    after = next((time for time in rows if time > (detected or struck)), None)
    return (detected - struck if detected else None), (after - struck if after else None)
