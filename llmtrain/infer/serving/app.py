"""The server as an ASGI app: paths, the key, bodies, streams, errors in OpenAI's form."""

import asyncio
import base64
import hmac
import json
import logging
import struct
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from llmtrain.errors import ConfigError, LlmtrainError
from llmtrain.files import parse_json
from llmtrain.infer.serving.answers import Form, usage
from llmtrain.infer.serving.asked import (
    AskedChat,
    AskedCompletion,
    AskedEmbedding,
    AskedError,
    AskedFilling,
    Written,
)
from llmtrain.infer.serving.batch_thread import DeadError
from llmtrain.infer.serving.choices import Choices, WrittenText
from llmtrain.infer.serving.service import Call, Service, require_ids, several

_logger = logging.getLogger(__name__)

LEFT = 499
"""The status of a call whose client has gone; nobody reads it."""
NUM_FILLINGS = 5

Endpoint = Callable[[Request], Awaitable[Response]]


def build_app(service: Service, key: str | None) -> Starlette:
    """The app of one model. With a key, every call but /health needs it."""
    endpoints: dict[str, tuple[str, Endpoint]] = {
        "/health": ("GET", lambda request: health(service)),
        "/metrics": ("GET", lambda request: shown(service)),
        "/v1/models": ("GET", lambda request: models(service)),
        "/v1/completions": ("POST", lambda request: complete(service, request)),
        "/v1/chat/completions": ("POST", lambda request: chat(service, request)),
        "/v1/embeddings": ("POST", lambda request: embed(service, request)),
        "/v1/fill-mask": ("POST", lambda request: fill(service, request)),
    }
    routes = [
        Route(path, guarded(service, path, None if path == "/health" else key, endpoint), methods=[method])
        for path, (method, endpoint) in endpoints.items()
    ]

    async def not_found(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        told = f"{request.method} {request.url.path[:200]}: {error.detail}. There are {', '.join(endpoints)}."
        return fault(AskedError(told, status=error.status_code))

    return Starlette(routes=routes, exception_handlers={404: not_found, 405: not_found})


def guarded(service: Service, path: str, key: str | None, endpoint: Endpoint) -> Endpoint:
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
        service.metrics.answered(path, response.status_code, time.perf_counter() - begin)
        return response

    return answered


def fault(error: AskedError) -> Response:
    return JSONResponse(error.body(), status_code=error.status, headers=error.headers)


def require_key(request: Request, key: str | None) -> None:
    """Raises AskedError where the call does not have the key."""
    given = request.headers.get("authorization", "").removeprefix("Bearer ")
    if key is not None and not hmac.compare_digest(given.encode("utf-8", "replace"), key.encode()):
        raise AskedError(
            "The API key is missing or wrong: send it as a bearer token.", status=401, code="invalid_api_key"
        )


async def content_of(service: Service, request: Request) -> Any:
    """The body's JSON. Raises AskedError for a body that is too large, too slow, or no JSON."""
    limit, body = service.limits.max_body, bytearray()
    too_large = AskedError(f"The body must have at most {limit:,} bytes.", status=413)
    if request.headers.get("content-length", "0").isdigit() and int(request.headers.get("content-length", "0")) > limit:
        raise too_large
    try:
        async with asyncio.timeout(service.limits.body_seconds):
            async for part in request.stream():
                body += part
                if len(body) > limit:
                    raise too_large
    except TimeoutError:
        raise AskedError("The body did not arrive in time.", status=408) from None
    try:
        return parse_json(bytes(body))
    except ValueError as error:
        raise AskedError(f"The body is no JSON: {str(error)[:200]}.") from None


async def health(service: Service) -> Response:
    failure = service.batch.failure
    return JSONResponse({"status": "ok"} if failure is None else {"status": str(failure)}, 503 if failure else 200)


async def shown(service: Service) -> Response:
    return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")


async def models(service: Service) -> Response:
    about = {"id": service.name, "object": "model", "created": 0, "owned_by": "llmtrain"}
    return JSONResponse({"object": "list", "data": [about]})


async def complete(service: Service, request: Request) -> Response:
    asked = AskedCompletion.of(await content_of(service, request))
    service.require_model(asked.model)
    call = service.completion(asked)
    return await written(
        service, request, asked, call, Form(service.model, service.name, "text_completion", call.likely)
    )


async def chat(service: Service, request: Request) -> Response:
    asked = AskedChat.of(await content_of(service, request))
    service.require_model(asked.model)
    guide = await asyncio.to_thread(service.guide, asked)  # others are answered meanwhile
    call = service.chat(asked, guide)
    return await written(
        service, request, asked, call, Form(service.model, service.name, "chat.completion", call.likely)
    )


async def written(service: Service, request: Request, asked: Written, call: Call, form: Form) -> Response:
    """The texts of a call: whole, or as a stream of events."""
    context = service.written(call)
    if asked.stream:
        context.__enter__()  # what is refused is refused before the answer begins
        return EventStream(context, events(context, asked, call, form))
    with context as choices:
        found = await unless_left(request, choices)
    return JSONResponse(form.envelope(form.whole(found, call.prefixes), usage=usage(call.prompt_tokens, found)))


class EventStream(StreamingResponse):
    """Events of some texts. Whatever is not finished when it ends is given up, also where the client leaves before the
    first event is asked for."""

    def __init__(self, context: Choices, parts: AsyncIterator[bytes]) -> None:
        super().__init__(parts, media_type="text/event-stream")
        self._context = context

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._context.__exit__(None, None, None)


async def unless_left(request: Request, choices: Choices) -> list[WrittenText]:
    """The finished texts. Raises ClientDisconnect where the client goes before."""

    async def left() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(choices.whole()), asyncio.ensure_future(left())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise ClientDisconnect
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()


async def events(context: Choices, asked: Written, call: Call, form: Form) -> AsyncIterator[bytes]:
    """Server-sent events of some texts."""
    try:
        counts = {"usage": None} if asked.tells_usage else {}
        offsets = [len(prefix) for prefix in call.prefixes]
        for index, prefix in enumerate(call.prefixes):
            first = {"index": index, "finish_reason": None, "logprobs": None}
            if form.is_chat:
                yield event(form, [first | {"delta": {"role": "assistant", "content": ""}}], **counts)
            elif prefix:
                yield event(form, [first | {"text": prefix}], **counts)
        async with aclosing(context.pieces()) as pieces:  # type: ignore[type-var]  # it is a generator
            async for piece in pieces:
                if piece.text or piece.ending or piece.logprobs:
                    yield event(form, [form.piece(piece, offsets[piece.place])], **counts)
                offsets[piece.place] += len(piece.text)
        if asked.tells_usage:
            yield event(form, [], usage=usage(call.prompt_tokens, context.choices))
        yield b"data: [DONE]\n\n"
    except AskedError as error:
        yield f"data: {json.dumps(error.body())}\n\n".encode()


def event(form: Form, choices: list[dict[str, Any]], **more: Any) -> bytes:
    content = form.envelope(choices, **more)
    if form.is_chat:
        content["object"] = "chat.completion.chunk"
    return f"data: {json.dumps(content)}\n\n".encode()


async def embed(service: Service, request: Request) -> Response:
    asked = AskedEmbedding.of(await content_of(service, request))
    service.require_model(asked.model)
    model, found, count = service.model, list[dict[str, Any]](), 0
    for index, given in enumerate(several(asked.input)):
        if isinstance(given, str):
            ids = service.faults_as("input", lambda given=given: model.framed(given))
        else:
            ids = service.faults_as("input", lambda given=given: require_ids(given, model.config.vocabulary))
        try:
            vector = await asyncio.wrap_future(service.batch.call(lambda ids=ids: model.embedding(ids)))
        except ConfigError as error:
            raise AskedError(f"input: {error}", "input") from None
        if asked.encoding_format == "base64":
            vector = base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
        found.append({"object": "embedding", "index": index, "embedding": vector})
        count += len(ids)
    counts = {"prompt_tokens": count, "total_tokens": count}
    return JSONResponse({"object": "list", "data": found, "model": service.name, "usage": counts})


async def fill(service: Service, request: Request) -> Response:
    asked = AskedFilling.of(await content_of(service, request))
    service.require_model(asked.model)
    model, found = service.model, list[dict[str, Any]]()
    if model.continues:
        raise AskedError("The model writes texts and fills no masks: ask /v1/completions.", status=404)
    for index, text in enumerate(several(asked.input)):
        work = service.batch.call(lambda text=text: model.fillings(text, asked.top_k or NUM_FILLINGS))
        try:
            _, fillings = await asyncio.wrap_future(work)
        except ConfigError as error:
            raise AskedError(f"input: {str(error).removeprefix('--prompt: ')}", "input") from None
        masks = [
            [
                {"token": token, "text": model.tokenizer.decode([token]), "probability": share}
                for token, share in each.tokens
            ]
            for each in fillings
        ]
        found.append({"index": index, "masks": masks})
    return JSONResponse({"object": "list", "data": found, "model": service.name})
