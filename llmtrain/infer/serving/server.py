"""A server on a port of this machine, until it is told to stop: then what was begun is finished."""

import asyncio
import errno
import logging
import os
import signal
import socket
import time
from collections.abc import Callable
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from llmtrain.errors import ConfigError
from llmtrain.infer.serving.open_calls import OpenCalls
from llmtrain.words import counted

_logger = logging.getLogger(__name__)

POLL_SECONDS = 0.1
TELL_SECONDS = 2.0
"""For calls that were cut off to reach their clients; one that does not read may take for ever."""


class ModelServer(uvicorn.Server):
    """A server that ends when its model has failed, and cuts off calls that take too long when it was told to stop."""

    def __init__(
        self, config: uvicorn.Config, calls: OpenCalls, drain_seconds: int, has_failed: Callable[[], bool]
    ) -> None:
        super().__init__(config)
        self._calls, self._drain_seconds, self._has_failed = calls, drain_seconds, has_failed
        self._is_hurried = False

    async def on_tick(self, counter: int) -> bool:
        """Asked several times a second whether to end."""
        return await super().on_tick(counter) or self._has_failed()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal ends it when what was begun is finished, a second one at once."""
        self._is_hurried, self.should_exit = self.should_exit, True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no more calls, and end when the open ones have ended or were cut off."""
        cutting = asyncio.ensure_future(self._cut_off())
        await super().shutdown(sockets)
        cutting.cancel()

    async def _cut_off(self) -> None:
        if self.should_exit and self._calls.num_open:
            count = counted(self._calls.num_open, "call")
            _logger.info(
                "told to stop: %s may take %d s more; a second signal ends at once", count, self._drain_seconds
            )
        end = time.monotonic() + self._drain_seconds
        while time.monotonic() < end and not self._is_hurried:
            await asyncio.sleep(POLL_SECONDS)
        if cut_off := self._calls.cut_off():
            _logger.warning("%s had not ended and got an error", counted(cut_off, "call"))
        await asyncio.sleep(TELL_SECONDS)
        self.force_exit = True


def open_port(host: str, port: int) -> socket.socket:
    """A socket of a host and port, on which nobody listens yet; port 0 is any that is free.

    Raises ConfigError where it cannot be had.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"--host {host[:200]}: is no address: {error}.") from None
    found = socket.socket(family, kind)
    # Else a server that was started again had to wait for what is left of the connections of the one before it.
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind(address)
    except OSError as error:
        found.close()
        if error.errno == errno.EADDRNOTAVAIL:
            raise ConfigError(f"--host {host}: is no address of this machine.") from None
        raise ConfigError(no_port(host, port, error)) from None
    return found


def no_port(host: str, port: int, error: OSError) -> str:
    told = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be had: {os.strerror(error.errno or 0)}"
    return f"--port {port}: {told} on {host}. Give another one, or 0 for any."


def run_server(
    app: ASGIApp,
    bound: socket.socket,
    drain_seconds: int,
    told: Callable[[str], None],
    has_failed: Callable[[], bool],
) -> None:
    """Tell the address, serve until SIGTERM or SIGINT, or until the model has failed, finish what was begun within so
    many seconds, and return.

    Raises ConfigError where somebody else has come to listen at the port.
    """
    calls = OpenCalls(app)
    # uvicorn would choose its loop and its parser by what is installed: this server is the same everywhere.
    config = uvicorn.Config(
        calls, loop="asyncio", http="h11", ws="none", log_level="warning", access_log=False, lifespan="off",
        server_header=False,
    )  # fmt: skip
    server = ModelServer(config, calls, drain_seconds, has_failed)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, server.handle_exit)  # also before it runs, and when it has ended
    host, port = bound.getsockname()[:2]
    try:
        bound.listen(config.backlog)  # who calls as soon as the address is told waits
    except OSError as error:
        raise ConfigError(no_port(host, port, error)) from None
    told(f"http://{f'[{host}]' if ':' in host else host}:{port}/v1")
    server.run(sockets=[bound])
