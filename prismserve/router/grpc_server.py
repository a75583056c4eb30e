"""The gRPC front door: generation, models, status, explanations, presets, health and reflection."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from typing import TYPE_CHECKING, Any, NoReturn

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from prismserve.core.errors import InvalidRequestError, PrismServeError
from prismserve.models.processing import ChatMessage, ImageSlot, VideoSlot
from prismserve.protocol import prismserve_pb2 as pb
from prismserve.protocol import prismserve_pb2_grpc as rpc
from prismserve.router.calls import Call, check_cache_salt, check_model, check_request_id
from prismserve.router.failures import failure_of
from prismserve.router.fidelity.judge import read_control
from prismserve.router.fields import json_object, refuse
from prismserve.router.generation import TextDelta
from prismserve.router.media import ImageSource
from prismserve.router.usage import plan_text
from prismserve.router.video import FrameChoice, VideoSource

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from prismserve.models.processing import Part
    from prismserve.router.config import RouterConfig
    from prismserve.router.generation import GenerationEvent
    from prismserve.router.media import Source
    from prismserve.router.service import RouterService
    from prismserve.router.tenants import Tenant
    from prismserve.router.usage import Usage

logger = logging.getLogger(__name__)

_ROLES = frozenset({"system", "user", "assistant"})
_FLOATS = frozenset({"temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"})
# Fields of the schema to those of ``structured_outputs``.
_CONSTRAINTS = {
    "json_schema": "json",
    "json_object": "json_object",
    "regex": "regex",
    "grammar": "grammar",
    "choice": "choice",
}
_SERVICE = pb.DESCRIPTOR.services_by_name["Inference"].full_name
_HEALTH_INTERVAL_S = 0.5


def _options(message: pb.SamplingParams, *, chat: bool) -> dict[str, Any]:
    """The fields that were set, as the JSON API would hold them, for a chat or a raw completion.

    Floats are 32 bits wide on this wire: seven digits give back the number that was meant, so that 0.7 here and in
    JSON sample alike.
    """
    values: dict[str, Any] = {}
    constraint: dict[str, Any] = {}
    for descriptor, value in message.ListFields():
        name = descriptor.name
        if name in _FLOATS:
            values[name] = float(f"{value:.7g}")
        elif name in ("stop", "stop_token_ids"):
            values[name] = list(value)
        elif name == "logit_bias":
            values[name] = {str(token): float(f"{bias:.7g}") for token, bias in value.items()}
        elif name == "logprobs" and chat:
            values |= {"logprobs": True, "top_logprobs": value}
        elif name in _CONSTRAINTS:
            constraint[_CONSTRAINTS[name]] = list(value) if name == "choice" else value
        else:
            values[name] = value
    return {**values, "structured_outputs": constraint} if constraint else values


def _compression(text: str) -> Any:
    if not text:
        return None
    if text.lstrip().startswith("{"):
        try:
            return json_object(text.encode())
        except InvalidRequestError:
            refuse("compression", "is not valid JSON")
    return text


def _video(message: pb.Video, field: str) -> VideoSource:
    if bool(message.file) == bool(message.frames):
        refuse(field, "give either file or frames")
    choice = FrameChoice(
        message.fps if message.HasField("fps") else None, message.num_frames if message.HasField("num_frames") else None
    )
    return VideoSource(message.file or tuple(message.frames), field, choice)


def call_of(request: pb.GenerateRequest, config: RouterConfig, timeout_s: float | None, tenant: Tenant) -> Call:
    """Read a request; InvalidRequestError names the field at fault."""
    if bool(request.messages) == bool(request.prompt):
        refuse("messages", "give either messages or prompt")
    if len(request.messages) > config.max_messages:
        refuse("messages", f"has {len(request.messages)} items, at most {config.max_messages} are allowed")
    media: list[Source] = []
    messages: list[ChatMessage] = []
    for index, message in enumerate(request.messages):
        field = f"messages[{index}]"
        if message.role not in _ROLES:
            refuse(f"{field}.role", "must be system, user or assistant")
        parts: list[Part] = []
        for number, part in enumerate(message.content):
            where = f"{field}.content[{number}]"
            match part.WhichOneof("part"):
                case "text":
                    parts.append(part.text)
                case "image" if message.role == "user":
                    parts.append(ImageSlot(len(media)))
                    media.append(ImageSource(part.image, f"{where}.image"))
                case "video" if message.role == "user":
                    parts.append(VideoSlot(len(media)))
                    media.append(_video(part.video, f"{where}.video"))
                case "image" | "video" as kind:
                    refuse(where, f"only user messages may hold {kind}s, not {message.role}")
                case _:
                    refuse(where, "must hold text, an image or a video")
        messages.append(ChatMessage(message.role, tuple(parts)))
    return Call(
        options=_options(request.sampling, chat=bool(request.messages)),
        messages=tuple(messages) or None,
        prompt=request.prompt or None,
        media=tuple(media),
        compression=_compression(request.compression),
        cache_salt=check_cache_salt(request.cache_salt, config),
        tenant=tenant,
        timeout_s=timeout_s,
    )


def usage_message(usage: Usage) -> pb.Usage:
    """The usage report on this wire."""
    return pb.Usage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        cached_tokens=usage.cached_tokens,
        visual_tokens_before=usage.visual_tokens_before,
        visual_tokens_after=usage.visual_tokens_after,
        kv_bytes_before=usage.kv_bytes_before,
        kv_bytes_after=usage.kv_bytes_after,
        kv_bytes_sent=usage.kv_bytes_sent,
        transport=usage.transport,
        ttft_ms=usage.ttft_ms,
        prefill_worker=usage.prefill_worker,
        decode_worker=usage.decode_worker,
        images=usage.images,
        images_cached=usage.images_cached,
        videos=usage.videos,
        frames=usage.frames,
        queue_ms=usage.queue_ms,
        encode_ms=usage.encode_ms,
        prefill_ms=usage.prefill_ms,
        transfer_ms=usage.transfer_ms,
        transfer_exposed_ms=usage.transfer_exposed_ms,
        route_reason=usage.route_reason,
        compression=plan_text(usage.compression, usage.preset_asked),
        visual_tokens_by_cut=usage.visual_tokens_by_cut,
    )


class InferenceServicer(rpc.InferenceServicer):
    """The public service over a :class:`RouterService`."""

    def __init__(self, service: RouterService) -> None:
        self._service = service

    async def Generate(  # noqa: N802 - the name in the schema
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncGenerator[pb.GenerateResponse, None]:
        """Stream the answer; the last message carries finish_reason and usage. A cancelled call ends everywhere."""
        arrived_at = time.monotonic()
        service = self._service
        try:
            tenant = self._tenant(context)
            check_model(request.model, service.facts.name)
            request_id = check_request_id(request.request_id)
            call = call_of(request, service.config, context.time_remaining(), tenant)
            async with contextlib.aclosing(service.answer(call, arrived_at=arrived_at)) as events:
                async for event in events:
                    yield self._response(request_id, event)
        except PrismServeError as error:
            await _abort(context, error)
        except Exception as error:  # a call's outermost frame: gRPC itself would tell the caller what it was
            logger.exception("unexpected error while serving a call")
            await _abort(context, error)

    def _tenant(self, context: grpc.aio.ServicerContext[Any, Any]) -> Tenant:
        """Who is asking; AuthenticationError if that is not known."""
        return self._service.tenants.authenticate_metadata(context.invocation_metadata() or ())

    def _response(self, request_id: str, event: GenerationEvent) -> pb.GenerateResponse:
        if isinstance(event, TextDelta):
            return pb.GenerateResponse(
                request_id=request_id,
                text=event.text,
                token_ids=event.token_ids,
                index=event.index,
                logprobs=[
                    pb.TokenLogprobs(
                        chosen=self._logprob(token, item.logprob), top=[self._logprob(*other) for other in item.top]
                    )
                    for token, item in zip(event.token_ids, event.logprobs, strict=False)
                ],
            )
        usage = usage_message(event.usage) if event.usage is not None else None
        return pb.GenerateResponse(
            request_id=request_id, finish_reason=event.reason.value, usage=usage, index=event.index
        )

    def _logprob(self, token_id: int, logprob: float) -> pb.TokenLogprob:
        return pb.TokenLogprob(token_id=token_id, token=self._service.token_bytes.of(token_id), logprob=logprob)

    async def ListModels(  # noqa: N802 - the name in the schema
        self, request: pb.ListModelsRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.ListModelsResponse:
        """The one model served."""
        del request
        try:
            self._tenant(context)
        except PrismServeError as error:
            await _abort(context, error)
        facts = self._service.facts
        return pb.ListModelsResponse(models=[pb.ModelCard(id=facts.name, max_model_len=facts.max_model_len)])

    async def GetStatus(  # noqa: N802 - the name in the schema
        self, request: pb.GetStatusRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.GetStatusResponse:
        """The status document as JSON."""
        del request
        try:
            self._tenant(context).require_admin()
        except PrismServeError as error:
            await _abort(context, error)
        return pb.GetStatusResponse(json=json.dumps(self._service.status()))

    async def Explain(  # noqa: N802 - the name in the schema
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.ExplainResponse:
        """What compression would do to the visual tokens of a request, and a picture of it."""
        service = self._service
        try:
            tenant = self._tenant(context)
            check_model(request.model, service.facts.name)
            call = call_of(request, service.config, context.time_remaining(), tenant)
            found, png = await service.explain(call, drawn=True)
        except PrismServeError as error:
            await _abort(context, error)
        return pb.ExplainResponse(json=json.dumps(found), png=png)

    async def SetPreset(  # noqa: N802 - the name in the schema
        self, request: pb.SetPresetRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.SetPresetResponse:
        """An operator's word about a preset."""
        fidelity = self._service.fidelity
        try:
            self._tenant(context).require_admin()
            fidelity.control(request.preset, read_control(request.control))
        except PrismServeError as error:
            await _abort(context, error)
        return pb.SetPresetResponse(json=json.dumps(fidelity.status()))


async def _abort(context: grpc.aio.ServicerContext[Any, Any], error: Exception) -> NoReturn:
    failure = failure_of(error)
    trailing = []
    if failure.param is not None:
        trailing.append(("prismserve-field", failure.param.encode("ascii", "replace").decode()))
    if failure.retry_after_s is not None:
        trailing.append(("retry-after", f"{failure.retry_after_s:g}"))
    await context.abort(failure.grpc_code, failure.message, tuple(trailing))


class GrpcDoor:
    """The gRPC server with its health and reflection services.

    Args:
        service: a started service.
        config: limits.
    """

    def __init__(self, service: RouterService, config: RouterConfig) -> None:
        self._service = service
        self._config = config
        self._server: grpc.aio.Server | None = None
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]
        self._watch: asyncio.Task[None] | None = None

    async def start(self, host: str, port: int) -> int:
        """Bind and serve; returns the port. OSError when the address cannot be bound."""
        options = [
            # Without this a second server would share a busy port instead of failing.
            ("grpc.so_reuseport", 0),
            ("grpc.max_receive_message_length", self._config.max_body_bytes),
            ("grpc.max_metadata_size", 16 << 10),
            # Well above the requests allowed, so that the surplus is refused at once instead of waiting at the client.
            ("grpc.max_concurrent_streams", self._config.max_connections),
        ]
        server = grpc.aio.server(options=options)
        rpc.add_InferenceServicer_to_server(InferenceServicer(self._service), server)  # type: ignore[no-untyped-call]
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        if not self._service.tenants.configured:
            # Reflection asks for no credential, and those who have one have the schema.
            reflection.enable_server_reflection((_SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
        try:
            bound = server.add_insecure_port(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
        except RuntimeError as error:
            message = f"cannot listen on port {port}"
            raise OSError(message) from error
        await server.start()
        self._server = server
        await self._publish()
        self._watch = asyncio.create_task(self._keep_health(), name="grpc-health")
        return bound

    async def stop(self) -> None:
        """Refuse new calls, give running ones ``stop_timeout_s``, then end them."""
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.gather(self._watch, return_exceptions=True)
        if self._server is not None:
            await self._health.enter_graceful_shutdown()
            await self._server.stop(self._config.stop_timeout_s)

    async def _keep_health(self) -> None:
        while True:
            await self._service.pool.wait_change(_HEALTH_INTERVAL_S)
            await self._publish()

    async def _publish(self) -> None:
        serving = health_pb2.HealthCheckResponse.SERVING
        value = serving if self._service.ready else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in ("", _SERVICE):
            await self._health.set(name, value)
