"""A server on a port of this machine, until it is told to stop: then what was begun is finished."""

import signal
import socket
from collections.abc import Callable
from pathlib import Path

import uvicorn
from starlette.applications import Starlette

from llmtrain.errors import ConfigError

LOOPBACK = ("127.0.0.1", "::1", "localhost")
SHORTEST_KEY = 16


def serving_key(file: Path | None, variable: str | None, host: str) -> str | None:
    """The API key: what a file holds, else the environment's variable.

    Raises ConfigError for one that is too short, and where there is none and others than this machine could call.
    """
    key = variable
    if file is not None:
        try:
            key = file.read_text("utf-8").strip()
        except (OSError, ValueError) as error:
            raise ConfigError(f"--key-file {file}: cannot be read: {error}.") from None
    if key is not None and len(key) < SHORTEST_KEY:
        place = "LLMTRAIN_API_KEY" if file is None else f"--key-file {file}"
        raise ConfigError(f"{place}: the key has {len(key)} characters, and must have at least {SHORTEST_KEY}.")
    if key is None and host not in LOOPBACK:
        raise ConfigError(
            f"--host {host}: others than this machine can call there, so a key is needed. Put one into a file and give "
            "--key-file FILE, or set LLMTRAIN_API_KEY."
        )
    return key


class ModelServer(uvicorn.Server):
    """A server that ends when its model has failed."""

    def __init__(self, config: uvicorn.Config, has_failed: Callable[[], bool]) -> None:
        super().__init__(config)
        self._has_failed = has_failed

    async def on_tick(self, counter: int) -> bool:
        """Asked several times a second whether to end."""
        return await super().on_tick(counter) or self._has_failed()


def open_port(address: tuple[str, int]) -> socket.socket:
    """A socket of a host and port, on which nobody listens yet; port 0 is any that is free.

    Raises ConfigError where it cannot be had.
    """
    host, port = address
    try:
        return uvicorn.Config("", host, port, log_level="critical").bind_socket()
    except SystemExit:
        raise ConfigError(f"--port {port}: cannot be had on {host}. Give another one, or 0 for any.") from None


def run_server(
    app: Starlette,
    address: tuple[str, int],
    drain_seconds: int,
    told: Callable[[str], None],
    has_failed: Callable[[], bool],
) -> None:
    """Tell the address, serve until SIGTERM or SIGINT, or until the model has failed, finish what was begun within so
    many seconds, and return.

    Raises ConfigError where the port cannot be had.
    """
    # uvicorn would choose its loop and its parser by what is installed: this server is the same everywhere.
    config = uvicorn.Config(
        app, loop="asyncio", http="h11", ws="none", log_level="warning", access_log=False, lifespan="off",
        timeout_graceful_shutdown=drain_seconds, server_header=False,
    )  # fmt: skip
    host, bound = address[0], open_port(address)
    # uvicorn raises a signal again when it has ended: by then it has been obeyed.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    with bound:
        bound.listen(config.backlog)  # who calls as soon as the address is told waits
        shown = f"[{host}]" if ":" in host else host
        told(f"http://{shown}:{bound.getsockname()[1]}/v1")
        ModelServer(config, has_failed).run(sockets=[bound])
