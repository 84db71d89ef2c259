"""A replica's side of a call: its app is asked as a server would ask it, and its answer sent back in parts."""

import asyncio
from collections.abc import AsyncIterator

from starlette.types import ASGIApp, Message, Scope

from llmtrain.infer.replicas.calls import AnswerHead, PassedCall


def scope_of(call: PassedCall) -> Scope:
    """What a server would tell its app about a call."""
    return {
        "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "method": call.method,
        "path": call.path, "raw_path": call.path.encode(), "query_string": b"", "root_path": "", "scheme": "http",
        "headers": [(b"content-length", str(len(call.body)).encode())], "client": None, "server": None,
    }  # fmt: skip


async def relayed(app: ASGIApp, call: PassedCall, replica: str) -> AsyncIterator[AnswerHead | bytes]:
    """The app's answer: its head, then what there is of its bytes whenever there is something.

    Given up, the app is told by cancelling it, so that it frees what the call holds.
    """
    sent, bodies = asyncio.Queue[Message | None](), [call.body]

    async def receive() -> Message:
        if bodies:
            return {"type": "http.request", "body": bodies.pop(), "more_body": False}
        return await asyncio.Future()  # nobody leaves by a message

    async def run() -> None:
        try:
            await app(scope_of(call), receive, sent.put)
        finally:
            sent.put_nowait(None)

    task = asyncio.ensure_future(run())
    try:
        while (message := await sent.get()) is not None:
            if message["type"] == "http.response.start":
                headers = [(name.decode(), value.decode()) for name, value in message["headers"]]
                yield AnswerHead(replica, message["status"], tuple(headers))
                continue
            parts, ended = [message["body"]], False
            while not sent.empty():  # what came meanwhile goes along: each part costs a message
                more = sent.get_nowait()
                ended = more is None
                parts.append(b"" if more is None else more["body"])
            if any(parts):
                yield b"".join(parts)
            if ended:
                break
        await task  # raises what the app has raised
    finally:
        task.cancel()
        await asyncio.wait([task])
