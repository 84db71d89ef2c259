"""Calls that a server is answering, and an error for those that it cannot finish."""

import asyncio
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llmtrain.infer.serving.asked import AskedError
from llmtrain.infer.serving.gate import error_event, fault

CUT_OFF = "The server was told to stop, and has given this up. Try again later."


class OpenCalls:
    """An app around another one that knows the calls on their way, and can cut them off.

    One that is cut off ends with 503 where its answer has not begun, and a stream of events with an event that says so.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._tasks = set[asyncio.Task[Any]]()
        self._is_cut_off = False

    @property
    def num_open(self) -> int:
        """Calls on their way."""
        return len(self._tasks)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        task, answer = asyncio.current_task(), BegunAnswer(send)
        assert task is not None
        self._tasks.add(task)
        try:
            await self._app(scope, receive, answer.send)
        except asyncio.CancelledError:
            error = AskedError(CUT_OFF, status=503, code="server_stopped")
            if self._is_cut_off and answer.head is None:
                await fault(error)(scope, receive, send)
            elif self._is_cut_off and answer.streams:
                await send({"type": "http.response.body", "body": error_event(error)})
            else:
                raise
        finally:
            self._tasks.discard(task)

    def cut_off(self) -> int:
        """End all calls that are on their way, and return their number."""
        self._is_cut_off = True
        for task in self._tasks:
            task.cancel()
        return self.num_open


class BegunAnswer:
    """What an app has sent of its answer: the head, once there is one."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.head: Message | None = None

    async def send(self, message: Message) -> None:
        """Pass it on."""
        if message["type"] == "http.response.start":
            self.head = message
        await self._send(message)

    @property
    def streams(self) -> bool:
        """True for a stream of events."""
        headers = [] if self.head is None else self.head["headers"]
        return any(name == b"content-type" and value.startswith(b"text/event-stream") for name, value in headers)
