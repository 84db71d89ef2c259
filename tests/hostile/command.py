"""Running many hostile command lines: what a case is, where it runs, and what is wrong with how it ended."""

import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.command import CommandServer

CPU_SECONDS = 5
"""Of the processor: other tests may run beside."""
MORE_BYTES = 500_000_000
HANGING_SECONDS = 120
MOST_OUTPUT = 1_000_000

ALLOWED = frozenset({0, 2, 3})
MAY_SAY_MORE = {"status": {1}, "diff": {1}, "eval": {1}}
"""Verbs whose exit code 1 is an answer: a run of which nothing is known, checkpoints that differ, a task that only an
extra brings."""

Spoil = Callable[[Path], None]


@dataclass(frozen=True)
class Case:
    """A command line in a folder of good things, some of which are spoiled first."""

    title: str
    arguments: tuple[str, ...]
    spoil: Spoil | None = field(default=None, compare=False)
    codes: frozenset[int] = ALLOWED


@dataclass(frozen=True)
class Ending:
    """How a command ended; a negative code is a signal."""

    code: int
    cpu_seconds: float
    size_kilobytes: int
    output: str


class Server:
    """Commands in forked children of one process; see `server`."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1", "WANDB_MODE": "offline", "TERM": "dumb"}
        environment |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "200"}
        environment.pop("LLMTRAIN_TRACEBACK", None)
        self._commands = CommandServer("tests.hostile.server", environment)

    def run(self, arguments: tuple[str, ...], folder: Path, **limits: int) -> Ending:
        output = folder / "output.txt"
        output.unlink(missing_ok=True)
        more = {"cpu_seconds": CPU_SECONDS, "more_bytes": MORE_BYTES, "seconds": HANGING_SECONDS, **limits}
        answer = self._commands.run(arguments, folder, stdout=str(output), stderr=str(output), **more)
        with output.open("rb") as file:
            said = file.read(MOST_OUTPUT + 1).decode("utf-8", "replace")
        return Ending(**answer, output=said)

    def close(self) -> None:
        self._commands.close()


def fault_of(case: Case, server: Server, good: Path, folder: Path) -> str | None:
    """Run a case in a copy of `good` at `folder`; what is wrong with its end, None where nothing is."""
    shutil.copytree(good, folder, symlinks=True)
    try:
        make_special_places(folder)
        if case.spoil:
            case.spoil(folder)
        ending = server.run(case.arguments, folder)
    finally:
        remove(folder)
    return judged(case, ending)


def judged(case: Case, ending: Ending) -> str | None:
    """What is wrong with how a case ended, with the end of what it said."""
    verbs = {word for word in case.arguments[:2] if word in MAY_SAY_MORE}
    allowed = case.codes.union(*(MAY_SAY_MORE[verb] for verb in verbs))
    faults = []
    if ending.code in (-signal.SIGXCPU, -signal.SIGKILL):
        faults.append(f"needed more than {CPU_SECONDS} s ({ending.cpu_seconds:.1f} s of the processor)")
    elif ending.code not in allowed:
        faults.append(f"exit code {ending.code}")
    if "Traceback (most recent call last)" in ending.output:
        faults.append("a traceback")
    if ending.code in (2, 3) and not ending.output.strip():
        faults.append("not a word")
    if len(ending.output) > MOST_OUTPUT:
        faults.append("endless output")
    if not faults:
        return None
    line = " ".join(word if len(word) < 200 else f"{word[:200]}...({len(word)})" for word in case.arguments)
    return f"{case.title}: {', '.join(faults)}\n  llmtrain {line!a}\n{ending.output[-3000:]}"


def make_special_places(folder: Path) -> None:
    """What hostile paths name beside good things."""
    (folder / "closed.yaml").write_bytes(b"{}")
    (folder / "closed.yaml").chmod(0o000)
    (folder / "closed").mkdir(0o000)
    os.mkfifo(folder / "pipe")
    (folder / "loop").symlink_to("loop")
    (folder / "dangling").symlink_to("nowhere")
    (folder / "empty").mkdir()
    (folder / "empty.json").write_bytes(b"")
    (folder / "noise").write_bytes(bytes(range(256)) * 20)


def remove(folder: Path) -> None:
    """A folder of which parts may be closed to everybody."""

    def open_and_retry(function: Callable[[str], None], path: str, _: Any) -> None:
        Path(path).parent.chmod(0o700)
        if not Path(path).is_symlink():
            Path(path).chmod(0o700)
        function(path)

    shutil.rmtree(folder, onerror=open_and_retry)
