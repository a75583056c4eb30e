"""The synchronous client: building, folding and the retry policy are shared with :mod:`prismserve.client.aio`."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Self, TypeVar, cast

import grpc

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
    from collections.abc import Generator, Mapping
    from types import TracebackType
    from typing import Unpack

    from prismserve.client.content import Conversation
    from prismserve.client.requests import GenerateOptions
    from prismserve.client.responses import Answer, ClusterStatus, Delta, Model

RequestT = TypeVar("RequestT")
ResponseT = TypeVar("ResponseT")


class Client:
    """A connection to a cluster's gRPC front door. Thread-safe; close it, or use it as a context manager.

    Args:
        target: ``host:port``.
        api_key: sent as a bearer token.
        credentials: for TLS; None connects in plain text.
        timeout_s: deadline of every call that gives none itself, in seconds.
        retry: when failed attempts are tried again.
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
            grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
            if credentials is None
            else grpc.secure_channel(address, credentials, options=CHANNEL_OPTIONS)
        )
        self._stub = pb_grpc.InferenceStub(self._channel)  # type: ignore[no-untyped-call]
        self._closed = False

    def generate(self, messages: Conversation | None = None, **options: Unpack[GenerateOptions]) -> Answer:
        """Ask and wait for the whole answer.

        Args:
            messages: a question, or the turns of a conversation; None with ``prompt=...``.
            options: see :class:`GenerateOptions`.

        Raises:
            ClientError: see :mod:`prismserve.client.errors`.
        """
        fold = AnswerFold(choices_of(options))
        for _ in self._deltas(messages, options, fold):
            pass
        return fold.close()

    def stream(
        self, messages: Conversation | None = None, **options: Unpack[GenerateOptions]
    ) -> Generator[Delta, None, None]:
        """Ask and yield the answer as it arrives; closing the generator cancels the request.

        Arguments and errors are those of :meth:`generate`; a malformed request raises here, not at the first delta.
        """
        return self._deltas(messages, options, AnswerFold(choices_of(options)))

    def models(self, *, timeout_s: float | None = None) -> tuple[Model, ...]:
        """The models served."""
        return models_of(self._unary(self._stub.ListModels, pb.ListModelsRequest(), timeout_s))

    def status(self, *, timeout_s: float | None = None) -> ClusterStatus:
        """Workers, pools and counters."""
        return status_of(self._unary(self._stub.GetStatus, pb.GetStatusRequest(), timeout_s))

    def set_preset(self, preset: str, control: str, *, timeout_s: float | None = None) -> Mapping[str, Any]:
        """An operator's word about a preset of the router that answers.

        Args:
            preset: ``turbo``, ``balanced`` or ``quality``.
            control: ``hold`` serves the next milder one in its place, ``release`` keeps it in force whatever replays
                say, ``auto`` leaves it to the fidelity guard.
            timeout_s: deadline of this call, in seconds.

        Returns:
            The block ``fidelity`` of the status document as it is then.
        """
        request = pb.SetPresetRequest(preset=preset, control=control)
        return presets_of(self._unary(self._stub.SetPreset, request, timeout_s))

    def close(self) -> None:
        """Close the connection; calls in progress end with CancelledError. Closing twice is fine."""
        self._closed = True
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _deltas(
        self, messages: Conversation | None, options: GenerateOptions, fold: AnswerFold
    ) -> Generator[Delta, None, None]:
        request = build_request(messages, options)
        attempts = Attempts(self._retry, timeout_of(options, self._timeout_s))
        return self._attempt(request, attempts, fold)

    def _attempt(
        self, request: pb.GenerateRequest, attempts: Attempts, fold: AnswerFold
    ) -> Generator[Delta, None, None]:
        while True:
            if self._closed:
                raise closed_error()
            call = self._stub.Generate(request, timeout=attempts.begin(), metadata=self._metadata)
            try:
                for response in call:
                    attempts.started = True
                    yield fold.add(response)
            except grpc.RpcError as failure:
                request_id = fold.request_id or request.request_id
                wait_s = attempts.after(from_rpc(cast("RpcFailure", failure), request_id=request_id))
            else:
                fold.close()
                return
            finally:
                call.cancel()
            time.sleep(wait_s)

    def _unary(
        self, method: grpc.UnaryUnaryMultiCallable[RequestT, ResponseT], request: RequestT, timeout_s: float | None
    ) -> ResponseT:
        attempts = Attempts(self._retry, checked_timeout(self._timeout_s if timeout_s is None else timeout_s))
        while True:
            if self._closed:
                raise closed_error()
            try:
                return method(request, timeout=attempts.begin(), metadata=self._metadata)
            except grpc.RpcError as failure:
                wait_s = attempts.after(from_rpc(cast("RpcFailure", failure)))
            time.sleep(wait_s)
