"""Running the installed command as a user does."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

COMMAND = str(Path(sys.executable).with_name("llmtrain"))
TIMEOUT_SECONDS = 300
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}


def llmtrain(*arguments: str | Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the command in `folder` and wait for it."""
    line = [COMMAND, *map(str, arguments)]
    return subprocess.run(
        line, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False
    )


def start_llmtrain(*arguments: str | Path, folder: Path) -> subprocess.Popen[str]:
    """Start the command in `folder`; its output goes to a file there."""
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
