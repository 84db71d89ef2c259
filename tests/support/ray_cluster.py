"""Real Ray clusters on this machine, with a token or open, of one node or several, as an operator starts them."""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

RAY = str(Path(sys.executable).with_name("ray"))
TIMEOUT_SECONDS = 300
LOOPBACK = "127.0.0.1"


@dataclass
class RayNode:
    """A node that `ray start --block` runs."""

    process: subprocess.Popen[bytes]

    def processes(self, name: str = "") -> list[psutil.Process]:
        """What runs on the node, as `gcs_server` or `raylet`."""
        with suppress(psutil.NoSuchProcess):
            found = psutil.Process(self.process.pid).children(recursive=True)
            return [process for process in found if name in process.name()]
        return []


@dataclass
class RayHead:
    """A cluster: `address` for ranks, `dashboard` for jobs, `environ` what a user of it has in the environment."""

    address: str
    dashboard: str
    token: str
    folder: Path
    environ: dict[str, str]
    nodes: list[RayNode] = field(default_factory=list)
    settings: dict[str, str] = field(default_factory=dict)
    """What all its nodes are started with."""

    def add_node(self, num_cpus: int) -> RayNode:
        """One more node, with a raylet of its own."""
        return _start(self, [f"--address={self.address}", f"--num-cpus={num_cpus}"])

    def end_node(self, node: RayNode, number: signal.Signals = signal.SIGTERM) -> None:
        self.nodes.remove(node)
        _end(node, number)


@contextmanager
def ray_head(
    num_cpus: int = 4, is_open: bool = False, is_outward: bool = False, extra: Mapping[str, str] | None = None
) -> Iterator[RayHead]:
    """A head with a dashboard, on ports of its own; everything is stopped and removed in the end.

    `is_open`: it asks nobody for a token. `is_outward`: it is known by this machine's address on the network, instead
    of 127.0.0.1. `extra` is added to the environment in which the head is started.
    """
    folder = Path(tempfile.mkdtemp(prefix="ray-test-", dir="/tmp"))  # short, for Ray's sockets
    token = "" if is_open else secrets.token_hex(16)
    token_path = folder / "token"
    token_path.touch(0o600)
    token_path.write_text(token, "utf-8")
    port, dashboard_port = _free_port(), _free_port()
    ip = outward_address() if is_outward else LOOPBACK
    head = RayHead(f"{ip}:{port}", f"http://{ip}:{dashboard_port}", token, folder, {})
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    access = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token_path)} if token else {}
    open_to_all = {"RAY_AUTH_MODE": "disabled"} if is_open else {}
    head.environ = {**kept, **access, "OMP_NUM_THREADS": "1", "NO_COLOR": "1", **(extra or {})}
    options = ["--head", f"--port={port}", f"--dashboard-port={dashboard_port}", f"--dashboard-host={ip}"]
    options += [f"--num-cpus={num_cpus}", f"--temp-dir={folder / 'ray'}", f"--ray-client-server-port={_free_port()}"]
    try:
        head.settings = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": str(int(is_outward)), **open_to_all}
        _start(head, options)
        yield head
    finally:
        for node in head.nodes[::-1]:
            _end(node, signal.SIGTERM)
        shutil.rmtree(folder, ignore_errors=True)


def outward_address() -> str:
    """This machine's address on the network."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # sends nothing
        return probe.getsockname()[0]


def _free_port() -> int:
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


def _start(head: RayHead, options: list[str]) -> RayNode:
    output = (head.folder / f"node-{len(head.nodes)}.log").open("wb")
    line = [RAY, "start", "--block", "--object-store-memory=90000000", "--disable-usage-stats", *options]
    # Two nodes of one machine cannot have the same port, and jobs are started by these agents.
    line += [f"--dashboard-agent-listen-port={_free_port()}"]
    environ = {**head.environ, "RAY_enable_metrics_collection": "0", **head.settings}
    process = subprocess.Popen(line, env=environ, stdout=output, stderr=output, start_new_session=True)
    node = RayNode(process)
    head.nodes.append(node)
    deadline = time.monotonic() + TIMEOUT_SECONDS
    log = Path(output.name)
    while "--block" not in log.read_text("utf-8", errors="replace"):
        assert process.poll() is None, log.read_text("utf-8", errors="replace")
        assert time.monotonic() < deadline, log.read_text("utf-8", errors="replace")
        time.sleep(0.1)
    output.close()
    return node


def _end(node: RayNode, number: signal.Signals) -> None:
    left = node.processes()
    with suppress(ProcessLookupError):
        node.process.send_signal(number)
    with suppress(subprocess.TimeoutExpired):
        node.process.wait(20)
    for process in psutil.wait_procs(left, timeout=5)[1]:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    node.process.kill()
    node.process.wait()
