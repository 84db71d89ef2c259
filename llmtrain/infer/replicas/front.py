"""The app in front of several replicas of a server: it keeps the key and the limits, and passes calls on."""

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from llmtrain.infer.replicas.calls import AnswerHead, LostError, PassedCall, Replicas, promised_tokens
from llmtrain.infer.replicas.figures import merged
from llmtrain.infer.serving.asked import AskedError, ServingLimits
from llmtrain.infer.serving.choices import RETRY_SECONDS
from llmtrain.infer.serving.gate import METHODS, Endpoint, body_of, error_event, gated, unless_left
from llmtrain.infer.serving.metrics import CallMetrics

MOST_DEATHS = 2
"""Replicas that may die with a call before it is given up: it may be what kills them."""

EVENT = b"data: "
FULL = 429


def build_front(replicas: Replicas, limits: ServingLimits, key: str | None) -> Starlette:
    """The app of a model that several replicas serve. With a key, every call but /health needs it."""
    metrics = CallMetrics()
    metrics.watch("replicas", "Replicas that answer", lambda: replicas.num_ready)
    front = Front(replicas, limits, metrics)
    own: dict[str, Endpoint] = {"/health": front.health, "/metrics": front.shown}
    return gated({path: own.get(path, front.passed_on) for path in METHODS}, key, metrics)


@dataclass(frozen=True)
class Begun:
    """An answer of which something has come: its head, the first bytes, and where the rest comes from."""

    head: AnswerHead
    first: bytes
    rest: AsyncGenerator[AnswerHead | bytes, None]


@dataclass(frozen=True)
class Front:
    """Replicas, and what stands before them."""

    replicas: Replicas
    limits: ServingLimits
    metrics: CallMetrics

    async def health(self, request: Request) -> Response:
        """Serving as long as one replica does."""
        ready, least = self.replicas.num_ready, self.replicas.least
        status = "ok" if ready >= least else "some replicas are missing" if ready else "no replica answers"
        return JSONResponse({"status": status, "replicas": ready, "least": least}, 200 if ready else 503)

    async def shown(self, request: Request) -> Response:
        """The figures of calls as they were answered here, and of tokens by replica."""
        content = merged(self.metrics.text().decode(), await self.replicas.figures())
        return Response(content, media_type="text/plain; version=0.0.4")

    async def passed_on(self, request: Request) -> Response:
        """What a replica answers."""
        body = await body_of(request, self.limits)
        tokens = promised_tokens(body, self.limits.max_tokens)
        call = PassedCall(request.method, request.url.path, body, tokens)
        try:
            begun = await unless_left(request, self._begun(call))
        except BaseException:
            call.outstanding = 0
            raise
        if begun.head.streams:
            return PassedStream(begun, call)
        call.outstanding = 0
        return Response(begun.first, begun.head.status, dict(begun.head.headers))

    async def _begun(self, call: PassedCall) -> Begun:
        """The answer of the first replica that takes the call: all of it, or of a stream the first bytes.

        One that dies before costs nothing but time. Raises AskedError where no replica is left.
        """
        for _ in range(MOST_DEATHS):
            try:
                begun = await self._asked(call)
                while begun.head.status == FULL and begun.head.replica not in call.refused_by:
                    call.refused_by.add(begun.head.replica)
                    if len(call.refused_by) < self.replicas.num_ready:
                        begun = await self._asked(call)
                return begun
            except LostError:
                continue
        raise AskedError("Replicas have died with this call. Try again later.", status=503)

    async def _asked(self, call: PassedCall) -> Begun:
        if not self.replicas.num_ready:
            told = "No replica answers at the moment. Try again later."
            raise AskedError(told, status=503, headers={"Retry-After": str(RETRY_SECONDS)})
        parts = self.replicas.ask(call)
        try:
            head = await anext(parts)
            assert isinstance(head, AnswerHead)
            first = b""
            async for part in parts:
                assert isinstance(part, bytes)
                first += part
                if head.streams:
                    return Begun(head, first, parts)
            return Begun(head, first, parts)
        except BaseException:
            await parts.aclose()
            raise


class PassedStream(StreamingResponse):
    """A stream of events that is passed on. However it ends, the replica hears of it."""

    def __init__(self, begun: Begun, call: PassedCall) -> None:
        super().__init__(passed_events(begun, call), begun.head.status, dict(begun.head.headers))
        self._begun, self._call = begun, call

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._call.outstanding = 0
            await self._begun.rest.aclose()


async def passed_events(begun: Begun, call: PassedCall) -> AsyncIterator[bytes]:
    """The events of a replica, and an event that says so where it dies. Each counts as a token that is written."""
    try:
        async with aclosing(begun.rest) as rest:
            part: AnswerHead | bytes = begun.first
            while part:
                assert isinstance(part, bytes)
                call.outstanding = max(1, call.outstanding - part.count(EVENT))
                yield part
                part = await anext(rest, b"")
    except LostError:
        told = "The replica that wrote this has died. What it wrote until then is right; ask again for the rest."
        yield error_event(AskedError(told, status=503, code="replica_lost"))
