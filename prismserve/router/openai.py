"""The OpenAI-compatible HTTP front door."""

from __future__ import annotations

import base64
import contextlib
import logging
import math
import time
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from prismserve.core.errors import AuthenticationError, EngineError, NotFoundError, OverloadedError, PrismServeError
from prismserve.router import metrics
from prismserve.router.admission import BodyBudget
from prismserve.router.calls import chat_call, check_model, completion_call
from prismserve.router.failures import INTERNAL, Failure, failure_of
from prismserve.router.fidelity.judge import read_control
from prismserve.router.fields import boolean, json_object, mapping, refuse
from prismserve.router.generation import TextDelta
from prismserve.router.http_io import drain, read_body, until_disconnect
from prismserve.router.openai_format import SSE_DONE, Choice, Format, sse
from prismserve.router.sampling import choices_of

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Mapping

    from prismserve.router.calls import Call
    from prismserve.router.generation import GenerationEvent
    from prismserve.router.service import RouterService
    from prismserve.router.tenants import Tenant
    from prismserve.router.usage import Usage

logger = logging.getLogger(__name__)

_SSE_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


def create_app(service: RouterService) -> FastAPI:
    """The HTTP application over a started service."""
    app = FastAPI(title="prismserve", docs_url=None, redoc_url=None, openapi_url=None)
    door = _Door(service)
    routes = (
        ("POST", "/v1/chat/completions", door.chat),
        ("POST", "/v1/completions", door.completion),
        ("GET", "/v1/models", door.models),
        ("GET", "/v1/models/{model:path}", door.model),
        ("GET", "/health", door.health),
        ("GET", "/-/healthz", door.alive),
        ("GET", "/metrics", door.metrics),
        ("GET", "/status", door.status),
        ("POST", "/v1/compression/explain", door.explain),
        ("GET", "/v1/compression/presets", door.presets),
        ("POST", "/v1/compression/presets/{preset}", door.set_preset),
    )
    for method, path, endpoint in routes:
        app.add_api_route(path, endpoint, methods=[method], response_model=None)
    app.add_exception_handler(PrismServeError, _on_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(Exception, _on_error)
    return app


def _respond(failure: Failure) -> JSONResponse:
    headers = {}
    if failure.retry_after_s is not None:
        headers["Retry-After"] = str(max(1, math.ceil(failure.retry_after_s)))
    if failure.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if failure.status in (408, 413):
        headers["Connection"] = "close"
    return JSONResponse(failure.openai(), failure.status, headers)


async def _on_error(_: Request, error: Exception) -> Response:
    failure = failure_of(error)
    if failure is INTERNAL:
        logger.error("unexpected error while serving a request", exc_info=error)
    return _respond(failure)


async def _on_http_error(_: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else INTERNAL.status
    texts = {404: "there is nothing at this path", 405: "this method is not allowed here"}
    message = texts.get(status, "the request cannot be served")
    return _respond(Failure(status, "invalid_request_error", None, INTERNAL.grpc_code, message))


def _stream_options(body: Mapping[str, Any]) -> tuple[bool, bool]:
    """Whether to stream, and whether to end with a usage chunk."""
    stream = boolean(body, "stream")
    value = body.get("stream_options")
    if value is None:
        return stream, False
    options = mapping(value, "stream_options")
    if not stream:
        refuse("stream_options", "is only allowed with stream: true")
    return stream, boolean(options, "include_usage")


class _Door:
    """The endpoints, bound to a service."""

    def __init__(self, service: RouterService) -> None:
        self._service = service

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        return await self._generate(request, chat=True)

    async def completion(self, request: Request) -> Response:
        """POST /v1/completions."""
        return await self._generate(request, chat=False)

    def _tenant(self, request: Request) -> Tenant:
        """Who is asking; AuthenticationError if that is not known."""
        return self._service.tenants.authenticate(request.headers.get("authorization"))

    async def models(self, request: Request) -> Response:
        """GET /v1/models."""
        self._tenant(request)
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def model(self, request: Request, model: str) -> Response:
        """GET /v1/models/{id}."""
        self._tenant(request)
        if model != self._service.facts.name:
            message = "there is no model of this name; /v1/models lists those served"
            raise NotFoundError(message, field="model")
        return JSONResponse(self._card())

    async def health(self) -> Response:
        """GET /health: 200 only while a request could be served."""
        if self._service.ready:
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": "unavailable"}, 503, {"Retry-After": "1"})

    async def alive(self) -> Response:
        """GET /-/healthz: 200 while the process answers."""
        return JSONResponse({"status": "alive"})

    async def metrics(self, request: Request) -> Response:
        """GET /metrics."""
        self._tenant(request).require_admin()
        return Response(self._service.metrics.render(), media_type=metrics.CONTENT_TYPE)

    async def status(self, request: Request) -> Response:
        """GET /status."""
        self._tenant(request).require_admin()
        return JSONResponse(self._service.status())

    async def explain(self, request: Request) -> Response:
        """POST /v1/compression/explain: the body of a chat request; ``overlay`` false leaves the picture out."""
        service = self._service
        with BodyBudget(service.admission, service.config) as budget:
            body, tenant = await self._admitted(request, budget)
            drawn = body.get("overlay") is None or boolean(body, "overlay")
            call = chat_call(body, service.config, tenant)
            found, png = await until_disconnect(request, service.explain(call, drawn=drawn))
        picture = {"format": "png", "data": base64.b64encode(png).decode()} if drawn else None
        head = {"object": "compression.explanation", "model": service.facts.name}
        return JSONResponse({**head, **found, "overlay": picture})

    async def presets(self, request: Request) -> Response:
        """GET /v1/compression/presets."""
        self._tenant(request).require_admin()
        return JSONResponse(self._service.fidelity.status())

    async def set_preset(self, request: Request, preset: str) -> Response:
        """POST /v1/compression/presets/{preset}: ``control`` is hold, release or auto."""
        service = self._service
        try:
            self._tenant(request).require_admin()
        except PrismServeError:
            await drain(request.stream())
            raise
        with BodyBudget(service.admission, service.config) as budget:
            body = json_object(await read_body(request, service.config, budget))
        service.fidelity.control(preset, read_control(body.get("control")))
        return JSONResponse(service.fidelity.status())

    async def _admitted(self, request: Request, budget: BodyBudget) -> tuple[Mapping[str, Any], Tenant]:
        """The body of a request whose sender may ask now, for the model that is served."""
        service = self._service
        try:
            tenant = self._tenant(request)
            service.admission.check(tenant)
        except (AuthenticationError, OverloadedError):
            await drain(request.stream())
            raise
        body = json_object(await read_body(request, service.config, budget))
        check_model(body.get("model"), service.facts.name)
        return body, tenant

    def _card(self) -> dict[str, Any]:
        facts = self._service.facts
        return {
            "id": facts.name,
            "object": "model",
            "created": self._service.created,
            "owned_by": "prismserve",
            "max_model_len": facts.max_model_len,
        }

    async def _generate(self, request: Request, *, chat: bool) -> Response:
        arrived_at = time.monotonic()
        service = self._service
        with BodyBudget(service.admission, service.config) as budget:
            body, tenant = await self._admitted(request, budget)
            stream, include_usage = _stream_options(body)
            call = self._call(body, tenant, chat=chat)
            choices = choices_of(body, service.config)
            answer = Format(service.facts, service.token_bytes, chat=chat, include_usage=include_usage)
            events = service.answer(call, arrived_at=arrived_at)
            if not stream:
                gathered, usage = await until_disconnect(request, _collect(events, choices))
                return JSONResponse(answer.whole(gathered, usage))
            # The status line must tell failures before the first token.
            first = await until_disconnect(request, _first(events))
        chunks = _chunks(first, events, answer, choices)
        return StreamingResponse(chunks, headers=_SSE_HEADERS, media_type="text/event-stream")

    def _call(self, body: Mapping[str, Any], tenant: Tenant, *, chat: bool) -> Call:
        if chat:
            return chat_call(body, self._service.config, tenant)
        return completion_call(body, self._service.config, self._service.processor.vocab_size, tenant)


async def _first(events: AsyncGenerator[GenerationEvent, None]) -> GenerationEvent:
    async for event in events:
        return event
    message = "the answer ended before it began"
    raise EngineError(message)


async def _collect(events: AsyncGenerator[GenerationEvent, None], choices: int) -> tuple[list[Choice], Usage]:
    gathered = [Choice() for _ in range(choices)]
    async with contextlib.aclosing(events):
        async for event in events:
            choice = gathered[event.index]
            if isinstance(event, TextDelta):
                choice.add(event)
                continue
            choice.reason = event.reason
            if event.usage is not None:
                return gathered, event.usage
    message = "the answer broke off"
    raise EngineError(message)


async def _chunks(
    first: GenerationEvent, events: AsyncGenerator[GenerationEvent, None], answer: Format, choices: int
) -> AsyncGenerator[bytes, None]:
    """The server-sent events of an answer; an error after the first token becomes an error event."""
    async with contextlib.aclosing(events):
        for opening in (answer.opening(index) for index in range(choices)):
            if opening is not None:
                yield sse(opening)
        try:
            event: GenerationEvent | None = first
            while event is not None:
                for document in _documents(event, answer):
                    yield sse(document)
                event = await anext(events, None)
        except PrismServeError as error:
            yield sse(failure_of(error).openai())
    yield SSE_DONE


def _documents(event: GenerationEvent, answer: Format) -> list[dict[str, Any]]:
    if isinstance(event, TextDelta):
        return [answer.delta(event)] if event.text or event.logprobs else []
    usage = answer.usage(event.usage) if event.usage is not None else None
    return [answer.ending(event.index, event.reason), *([usage] if usage is not None else [])]
