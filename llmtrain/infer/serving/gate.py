"""The way into a server: paths, the key, bodies within their limits, clients that leave, errors in OpenAI's form."""

import asyncio
import hmac
import json
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from llmtrain.errors import LlmtrainError
from llmtrain.files import parse_json
from llmtrain.infer.serving.asked import AskedError, ServingLimits
from llmtrain.infer.serving.batch_thread import DeadError
from llmtrain.infer.serving.metrics import CallMetrics

_logger = logging.getLogger(__name__)

METHODS = {
    "/health": "GET",
    "/metrics": "GET",
    "/v1/models": "GET",
    "/v1/completions": "POST",
    "/v1/chat/completions": "POST",
    "/v1/embeddings": "POST",
    "/v1/fill-mask": "POST",
}
"""The method of each path that a server has."""

LEFT = 499
"""The status of a call whose client has gone; nobody reads it."""

Endpoint = Callable[[Request], Awaitable[Response]]
Result = TypeVar("Result")


def gated(endpoints: Mapping[str, Endpoint], key: str | None, metrics: CallMetrics) -> Starlette:
    """An app with an endpoint for each path of METHODS. With a key, every call but /health needs it."""
    routes = [
        Route(path, guarded(metrics, path, None if path == "/health" else key, endpoints[path]), methods=[method])
        for path, method in METHODS.items()
    ]

    async def not_found(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        told = f"{request.method} {request.url.path[:200]}: {error.detail}. There are {', '.join(METHODS)}."
        return fault(AskedError(told, status=error.status_code))

    return Starlette(routes=routes, exception_handlers={404: not_found, 405: not_found})


def guarded(metrics: CallMetrics, path: str, key: str | None, endpoint: Endpoint) -> Endpoint:
    """The endpoint behind its key; its errors are answers, and its calls are counted."""

    async def answered(request: Request) -> Response:
        begin = time.perf_counter()
        try:
            require_key(request, key)
            response = await endpoint(request)
        except AskedError as error:
            response = fault(error)
        except ClientDisconnect:
            response = Response(status_code=LEFT)
        except DeadError as error:
            response = fault(AskedError(str(error), status=503))
        except LlmtrainError as error:
            response = fault(AskedError(str(error)))
        except Exception:
            _logger.exception("%s has failed", path)
            response = fault(AskedError("The server has failed at this call.", status=500))
        metrics.answered(path, response.status_code, time.perf_counter() - begin)
        return response

    return answered


def fault(error: AskedError) -> Response:
    return JSONResponse(error.body(), status_code=error.status, headers=error.headers)


def error_event(error: AskedError) -> bytes:
    """What ends a stream that has begun."""
    return f"data: {json.dumps(error.body())}\n\n".encode()


def require_key(request: Request, key: str | None) -> None:
    """Raises AskedError where the call does not have the key."""
    given = request.headers.get("authorization", "").removeprefix("Bearer ")
    if key is not None and not hmac.compare_digest(given.encode("utf-8", "replace"), key.encode()):
        raise AskedError(
            "The API key is missing or wrong: send it as a bearer token.", status=401, code="invalid_api_key"
        )


async def body_of(request: Request, limits: ServingLimits) -> bytes:
    """Raises AskedError for a body that is too large or too slow."""
    body, said = bytearray(), request.headers.get("content-length", "0")
    too_large = AskedError(f"The body must have at most {limits.max_body:,} bytes.", status=413)
    if said.isdigit() and int(said) > limits.max_body:
        raise too_large
    try:
        async with asyncio.timeout(limits.body_seconds):
            async for part in request.stream():
                body += part
                if len(body) > limits.max_body:
                    raise too_large
    except TimeoutError:
        raise AskedError("The body did not arrive in time.", status=408) from None
    return bytes(body)


async def content_of(request: Request, limits: ServingLimits) -> Any:
    """The body's JSON. Raises AskedError as `body_of` does, and for what is no JSON."""
    body = await body_of(request, limits)
    try:
        return parse_json(body)
    except ValueError as error:
        raise AskedError(f"The body is no JSON: {str(error)[:200]}.") from None


async def unless_left(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """What work brings. Ends it and raises ClientDisconnect where the client goes before."""

    async def left() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, leaving = asyncio.ensure_future(work), asyncio.ensure_future(left())
    try:
        await asyncio.wait([task, leaving], return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        leaving.cancel()
