"""A real `llmtrain serve` process."""

import os
import re
import signal
import subprocess
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from tests.support.command import COMMAND, ENVIRONMENT, TIMEOUT_SECONDS

KEY = "a key of a test, long enough"


@dataclass(frozen=True)
class Server:
    """Its process, the address of its interface, and a figure of /metrics by its name."""

    process: subprocess.Popen[str]
    url: str

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {KEY}"}

    def post(self, path: str, content: object) -> httpx.Response:
        return httpx.post(f"{self.url}{path}", json=content, headers=self.headers, timeout=TIMEOUT_SECONDS)

    def figure(self, name: str) -> float:
        text = httpx.get(f"{self.url.removesuffix('/v1')}/metrics", headers=self.headers).text
        (found,) = re.findall(rf"^llmtrain_{re.escape(name)} (\S+)$", text, re.MULTILINE)
        return float(found)

    def resident_bytes(self) -> int:
        lines = Path(f"/proc/{self.process.pid}/status").read_text("ascii").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) * 1024

    def wait_until_idle(self) -> None:
        """Until no text is on its way. Fails where one stays."""
        for _ in range(2000):
            if self.figure("open_texts") == 0:
                return
        raise AssertionError(f"{self.figure('open_texts')} texts are still on their way")


@contextmanager
def served(model: Path, *options: str, environ: Mapping[str, str] = ENVIRONMENT) -> Iterator[Server]:
    """Serve a model on a free port with a key; it is stopped as Slurm or a user would."""
    line = [COMMAND, "serve", str(model), "--port", "0", *options]
    environment = {**environ, "LLMTRAIN_API_KEY": KEY}
    with (model.parent / "server.txt").open("w") as errors:
        process = subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True)
    guard = threading.Timer(TIMEOUT_SECONDS, process.kill)
    guard.start()
    assert process.stdout is not None
    url = process.stdout.readline().strip()
    guard.cancel()
    assert url.startswith("http://"), (model.parent / "server.txt").read_text()
    try:
        yield Server(process, url)
    finally:
        if process.poll() is None:
            os.kill(process.pid, signal.SIGTERM)
            process.wait(TIMEOUT_SECONDS)
        process.stdout.close()
