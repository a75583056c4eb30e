"""The asynchronous client: building, folding and the retry policy are shared with :mod:`prismserve.client.client`."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Self, TypeVar, cast

import grpc
import grpc.aio

from prismserve.client.channel import (
    CHANNEL_OPTIONS,
    DEFAULT_TARGET,
    DEFAULT_TIMEOUT_S,
    checked_target,
    closed_error,
    metadata_of,
)
from prismserve.client.errors import RpcFailure, from_rpc
from prismserve.client.requests import build_request, checked_timeout, choices_of, timeout_of
from prismserve.client.responses import AnswerFold, models_of, presets_of, status_of
from prismserve.client.retry import Attempts, RetryPolicy
from prismserve.protocol import prismserve_pb2 as pb
from prismserve.protocol import prismserve_pb2_grpc as pb_grpc

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Mapping
    from types import TracebackType
    from typing import Unpack

    from prismserve.client.content import Conversation
    from prismserve.client.requests import GenerateOptions
    from prismserve.client.responses import Answer, ClusterStatus, Delta, Model

RequestT = TypeVar("RequestT")
ResponseT = TypeVar("ResponseT")


class AsyncClient:
    """A connection to a cluster's gRPC front door for one event loop. Close it, or use it as a context manager.

    Arguments, methods and errors are those of :class:`prismserve.client.Client`. Make it inside the running loop.
    Image files given by path are read in the caller's thread.
    """

    def __init__(
        self,
        target: str = DEFAULT_TARGET,
        *,
        api_key: str | None = None,
        credentials: grpc.ChannelCredentials | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        retry: RetryPolicy | None = None,
    ) -> None:
        self._timeout_s = checked_timeout(timeout_s)
        self._metadata = metadata_of(api_key)
        self._retry = retry or RetryPolicy()
        address = checked_target(target)
        self._channel = (
            grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
            if credentials is None
            else grpc.aio.secure_channel(address, credentials, options=CHANNEL_OPTIONS)
        )
        self._stub = pb_grpc.InferenceStub(self._channel)  # type: ignore[no-untyped-call]
        self._closed = False

    async def generate(self, messages: Conversation | None = None, **options: Unpack[GenerateOptions]) -> Answer:
        """Ask and wait for the whole answer; see :meth:`prismserve.client.Client.generate`."""
        fold = AnswerFold(choices_of(options))
        async for _ in self._deltas(messages, options, fold):
            pass
        return fold.close()

    def stream(
        self, messages: Conversation | None = None, **options: Unpack[GenerateOptions]
    ) -> AsyncGenerator[Delta, None]:
        """Ask and yield the answer as it arrives; closing the generator cancels the request."""
        return self._deltas(messages, options, AnswerFold(choices_of(options)))

    async def models(self, *, timeout_s: float | None = None) -> tuple[Model, ...]:
        """The models served."""
        return models_of(await self._unary(self._stub.ListModels, pb.ListModelsRequest(), timeout_s))

    async def status(self, *, timeout_s: float | None = None) -> ClusterStatus:
        """Workers, pools and counters."""
        return status_of(await self._unary(self._stub.GetStatus, pb.GetStatusRequest(), timeout_s))

    async def set_preset(self, preset: str, control: str, *, timeout_s: float | None = None) -> Mapping[str, Any]:
        """An operator's word about a preset; see :meth:`prismserve.client.Client.set_preset`."""
        request = pb.SetPresetRequest(preset=preset, control=control)
        return presets_of(await self._unary(self._stub.SetPreset, request, timeout_s))

    async def close(self) -> None:
        """Close the connection; calls in progress end with CancelledError. Closing twice is fine."""
        self._closed = True
        await self._channel.close(None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def _deltas(
        self, messages: Conversation | None, options: GenerateOptions, fold: AnswerFold
    ) -> AsyncGenerator[Delta, None]:
        request = build_request(messages, options)
        attempts = Attempts(self._retry, timeout_of(options, self._timeout_s))
        return self._attempt(request, attempts, fold)

    async def _attempt(
        self, request: pb.GenerateRequest, attempts: Attempts, fold: AnswerFold
    ) -> AsyncGenerator[Delta, None]:
        while True:
            if self._closed:
                raise closed_error()
            call = self._stub.Generate(request, timeout=attempts.begin(), metadata=self._metadata)
            try:
                async for response in call:
                    attempts.started = True
                    yield fold.add(response)
            except grpc.aio.AioRpcError as failure:
                request_id = fold.request_id or request.request_id
                wait_s = attempts.after(from_rpc(cast("RpcFailure", failure), request_id=request_id))
            else:
                fold.close()
                return
            finally:
                call.cancel()
            await asyncio.sleep(wait_s)

    async def _unary(
        self,
        method: grpc.aio.UnaryUnaryMultiCallable[RequestT, ResponseT],
        request: RequestT,
        timeout_s: float | None,
    ) -> ResponseT:
        attempts = Attempts(self._retry, checked_timeout(self._timeout_s if timeout_s is None else timeout_s))
        while True:
            if self._closed:
                raise closed_error()
            try:
                return await method(request, timeout=attempts.begin(), metadata=self._metadata)
            except grpc.aio.AioRpcError as failure:
                wait_s = attempts.after(from_rpc(cast("RpcFailure", failure)))
            await asyncio.sleep(wait_s)
