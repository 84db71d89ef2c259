"""The server as an ASGI app: what each path answers, whole or as a stream of events."""

import asyncio
import base64
import json
import struct
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from llmtrain.errors import ConfigError
from llmtrain.infer.serving.answers import Form, usage
from llmtrain.infer.serving.asked import (
    AskedChat,
    AskedCompletion,
    AskedEmbedding,
    AskedError,
    AskedFilling,
    Written,
)
from llmtrain.infer.serving.choices import Choices
from llmtrain.infer.serving.gate import Endpoint, content_of, error_event, gated, unless_left
from llmtrain.infer.serving.service import Call, Service, fault_of, require_ids, several

NUM_FILLINGS = 5


def build_app(service: Service, key: str | None) -> Starlette:
    """The app of one model. With a key, every call but /health needs it."""
    endpoints: dict[str, Endpoint] = {
        "/health": lambda request: health(service),
        "/metrics": lambda request: shown(service),
        "/v1/models": lambda request: models(service),
        "/v1/completions": lambda request: complete(service, request),
        "/v1/chat/completions": lambda request: chat(service, request),
        "/v1/embeddings": lambda request: embed(service, request),
        "/v1/fill-mask": lambda request: fill(service, request),
    }
    return gated(endpoints, key, service.metrics)


async def health(service: Service) -> Response:
    failure = service.batch.failure
    return JSONResponse({"status": "ok"} if failure is None else {"status": str(failure)}, 503 if failure else 200)


async def shown(service: Service) -> Response:
    return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")


async def models(service: Service) -> Response:
    about = {"id": service.name, "object": "model", "created": 0, "owned_by": "llmtrain"}
    return JSONResponse({"object": "list", "data": [about]})


async def complete(service: Service, request: Request) -> Response:
    asked = AskedCompletion.of(await content_of(request, service.limits))
    service.require_model(asked.model)
    call = service.completion(asked)
    return await written(
        service, request, asked, call, Form(service.model, service.name, "text_completion", call.likely)
    )


async def chat(service: Service, request: Request) -> Response:
    asked = AskedChat.of(await content_of(request, service.limits))
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
        found = await unless_left(request, choices.whole())
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


async def events(context: Choices, asked: Written, call: Call, form: Form) -> AsyncIterator[bytes]:
    """Server-sent events of some texts."""
    try:
        counts = {"usage": None} if asked.tells_usage else {}
        offsets = [len(prefix) for prefix in call.prefixes]
        opening = [event(form, [each], **counts) for each in openings(call, form)]
        async with aclosing(context.pieces()) as pieces:  # type: ignore[type-var]  # it is a generator
            async for piece in pieces:
                # Not before the first token: until then another server could still be asked instead of this one.
                while opening:
                    yield opening.pop(0)
                if piece.text or piece.ending or piece.logprobs:
                    yield event(form, [form.piece(piece, offsets[piece.place])], **counts)
                offsets[piece.place] += len(piece.text)
        if asked.tells_usage:
            yield event(form, [], usage=usage(call.prompt_tokens, context.choices))
        yield b"data: [DONE]\n\n"
    except AskedError as error:
        yield error_event(error)


def openings(call: Call, form: Form) -> Iterator[dict[str, Any]]:
    """What each text of a stream begins with: who speaks, or what is echoed."""
    for index, prefix in enumerate(call.prefixes):
        first = {"index": index, "finish_reason": None, "logprobs": None}
        if form.is_chat:
            yield first | {"delta": {"role": "assistant", "content": ""}}
        elif prefix:
            yield first | {"text": prefix}


def event(form: Form, choices: list[dict[str, Any]], **more: Any) -> bytes:
    content = form.envelope(choices, **more)
    if form.is_chat:
        content["object"] = "chat.completion.chunk"
    return f"data: {json.dumps(content)}\n\n".encode()


async def embed(service: Service, request: Request) -> Response:
    asked = AskedEmbedding.of(await content_of(request, service.limits))
    service.require_model(asked.model)
    model, found, count = service.model, list[dict[str, Any]](), 0
    for index, (place, given) in enumerate(several("input", asked.input).items()):
        if isinstance(given, str):
            ids = service.faults_as(place, lambda given=given: model.framed(given))
        else:
            ids = service.faults_as(place, lambda given=given: require_ids(given, model.config.vocabulary))
        try:
            vector = await asyncio.wrap_future(service.batch.call(lambda ids=ids: model.embedding(ids)))
        except ConfigError as error:
            raise fault_of(place, error) from None
        if asked.encoding_format == "base64":
            vector = base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
        found.append({"object": "embedding", "index": index, "embedding": vector})
        count += len(ids)
    counts = {"prompt_tokens": count, "total_tokens": count}
    return JSONResponse({"object": "list", "data": found, "model": service.name, "usage": counts})


async def fill(service: Service, request: Request) -> Response:
    asked = AskedFilling.of(await content_of(request, service.limits))
    service.require_model(asked.model)
    model, found = service.model, list[dict[str, Any]]()
    if model.continues:
        raise AskedError("The model writes texts and fills no masks: ask /v1/completions.", status=404)
    if model.named.mask is None:
        raise AskedError("The model's tokenizer has no mask token, so there is nothing to fill.", status=404)
    for index, (place, text) in enumerate(several("input", asked.input).items()):
        work = service.batch.call(lambda text=text: model.fillings(text, asked.top_k or NUM_FILLINGS))
        try:
            _, fillings = await asyncio.wrap_future(work)
        except ConfigError as error:
            raise fault_of(place, error) from None
        masks = [
            [
                {"token": token, "text": model.tokenizer.decode([token]), "probability": share}
                for token, share in each.tokens
            ]
            for each in fillings
        ]
        found.append({"index": index, "masks": masks})
    return JSONResponse({"object": "list", "data": found, "model": service.name})
