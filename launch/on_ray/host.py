"""A worker of the cluster: it holds the room for one rank, and starts the process that forks the rank."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection

import psutil
import ray

from launch.forking.agent_rank_set import Message
from llmtrain.errors import LaunchError

NEWS = "news"
"""The group of calls that waits for news. All others are made one after the other, in the order of the questions."""


@dataclass(frozen=True)
class HostFacts:
    """The place of a worker. `node` is the cluster's name of its machine; `address` is that machine's in the
    cluster."""

    node: str
    hostname: str
    address: str
    has_gpu: bool


class RankHost:
    """The actor: it starts an agent (launch/forking/agent.py) and passes messages on."""

    def __init__(self, folder: str, engine: str, environment: Mapping[str, str]) -> None:
        """`folder` is where the run was started: paths of its configuration are relative to it."""
        self._problem = ""
        here, there = socket.socketpair()
        self._agent = Connection(here.detach())
        line = [sys.executable, "-m", "launch.forking.agent", str(there.fileno()), engine]
        # Not forked from this process: it has the threads of Ray's client, which no fork survives.
        try:
            subprocess.Popen(
                line,
                cwd=folder,
                env={**os.environ, **gloo_interface(ray.util.get_node_ip_address()), **environment},
                pass_fds=[there.fileno()],
                stdin=subprocess.DEVNULL,
            )
        except OSError as error:
            self._problem = (
                f"{error.filename or sys.executable}: cannot be used on {socket.gethostname()}: {error.strerror}. "
                "Every machine of the cluster needs the folder in which the run is started, at the same path, and "
                "llmtrain."
            )
        there.close()

    def ready(self) -> HostFacts:
        """The place of this worker, once all that a rank needs is imported. Raises LaunchError where that fails."""
        said = {} if self._problem else self._hear()
        if said.get("say") != "ready":
            raise LaunchError(self._problem or said.get("text") or "the process that is to fork ranks has ended")
        gpus = ray.get_gpu_ids()
        node = ray.get_runtime_context().get_node_id()
        return HostFacts(node, socket.gethostname(), ray.util.get_node_ip_address(), bool(gpus))

    def ping(self) -> None:
        """Return, if this worker lives."""

    def tell(self, message: Message) -> None:
        """Pass a message on to the agent. One that is gone says so in `news`."""
        try:
            self._agent.send_bytes(json.dumps(message).encode())
        except ConnectionError:
            return

    @ray.method(concurrency_group=NEWS)
    def news(self, seconds: float) -> list[Message]:
        """The agent's messages since the last call, as soon as there is one, at most `seconds` later."""
        said = []
        if self._agent.poll(seconds):
            said.append(self._hear())
            while said[-1]["say"] != "gone" and self._agent.poll():
                said.append(self._hear())
        return said

    def _hear(self) -> Message:
        try:
            return json.loads(self._agent.recv_bytes())
        except (EOFError, ConnectionError):
            return {"say": "gone", "text": "the process that forked it on its worker has died"}


def gloo_interface(address: str) -> dict[str, str]:
    """The variable by which gloo uses the network of an address; a machine's name may lead to another, or nowhere."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address == address for entry in addresses):
            return {"GLOO_SOCKET_IFNAME": name}
    return {}
