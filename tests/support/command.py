"""Running the command: at once in a copy of a process that has imported it, or as a user does."""

import atexit
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

COMMAND = str(Path(sys.executable).with_name("llmtrain"))
TIMEOUT_SECONDS = 300
ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}


class CommandServer:
    """The process of a module that serves commands: see tests/support/command_server.py."""

    def __init__(self, module: str, environment: Mapping[str, str]) -> None:
        line = [sys.executable, "-m", module]
        self._process = subprocess.Popen(
            line, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        assert self._read() == "ready"

    def _read(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the server is gone"
        return line.strip()

    def run(self, arguments: tuple[str, ...], folder: Path, **more: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"arguments": arguments, "folder": str(folder), **more}) + "\n")
        self._process.stdin.flush()
        return json.loads(self._read())

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


@cache
def _server() -> CommandServer:
    server = CommandServer("tests.support.command_server", ENVIRONMENT)
    atexit.register(server.close)
    return server


def llmtrain(*arguments: str | Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the command in `folder`, in a process that need not import it first, and wait for it."""
    words = tuple(map(str, arguments))
    with TemporaryDirectory() as place:
        said = {name: Path(place, name) for name in ("stdout", "stderr")}
        files = {name: str(path) for name, path in said.items()}
        code = _server().run(words, folder, **files, seconds=TIMEOUT_SECONDS)["code"]
        texts = [path.read_text("utf-8") for path in said.values()]
    return subprocess.CompletedProcess([COMMAND, *words], code, *texts)


def llmtrain_anew(*arguments: str | Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """The same of the installed command, which imports what ENVIRONMENT lets it find."""
    line = [COMMAND, *map(str, arguments)]
    return subprocess.run(
        line, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False
    )


def start_llmtrain(*arguments: str | Path, folder: Path) -> subprocess.Popen[str]:
    """Start the installed command in `folder`; its output goes to a file there."""
    with (folder / "output.txt").open("a") as output:
        return subprocess.Popen(
            [COMMAND, *map(str, arguments)], cwd=folder, env=ENVIRONMENT, stdout=output, stderr=output, text=True
        )


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Wait until something has happened while a process runs. Fails where the process ends before."""
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not condition():
        assert process.poll() is None, f"ended with {process.returncode} before it was due"
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.002)
