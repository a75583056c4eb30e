"""How the data plane's gRPC channels and servers are opened: message caps, keepalive, and the cluster secret."""

from __future__ import annotations

import hmac
from typing import TYPE_CHECKING, Any, Final

import grpc
from grpc import aio

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

SECRET_HEADER: Final = "prismserve-cluster-secret"  # noqa: S105 - the name of the header, not the secret
MAX_MESSAGE_BYTES: Final = 128 * 1024 * 1024
"""Cap of one data-plane message: a submission carries the request's encoded images."""

CHANNEL_OPTIONS: Final = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.enable_http_proxy", 0),
)
SERVER_OPTIONS: Final = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.so_reuseport", 0),
)


def open_channel(address: str) -> aio.Channel:
    """A channel to a worker's data-plane server at ``host:port``; the caller closes it."""
    return aio.insecure_channel(address, options=list(CHANNEL_OPTIONS))


def secret_metadata(secret: str) -> tuple[tuple[str, str], ...]:
    """Call metadata that proves membership of the cluster."""
    return ((SECRET_HEADER, secret),)


class ClusterSecretInterceptor(aio.ServerInterceptor):  # type: ignore[type-arg] # generic in the stubs only
    """Refuses every call that does not carry the cluster secret, before its message is read."""

    def __init__(self, secret: str) -> None:
        self._secret = secret.encode()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any]]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any]:
        """Pass the call on, or refuse it."""
        for name, value in handler_call_details.invocation_metadata or ():
            if name == SECRET_HEADER:
                given = value if isinstance(value, bytes) else value.encode()
                if hmac.compare_digest(given, self._secret):
                    return await continuation(handler_call_details)
        return _refusal(await continuation(handler_call_details))


def _refusal(handler: grpc.RpcMethodHandler[Any, Any] | None) -> grpc.RpcMethodHandler[Any, Any]:
    """A handler of the same shape that refuses, so that streams are told why as well."""

    async def refuse(_request: Any, context: aio.ServicerContext[Any, Any]) -> None:
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, "the cluster secret is missing or wrong")

    if handler is not None and handler.request_streaming:
        return grpc.stream_stream_rpc_method_handler(refuse)
    return grpc.unary_unary_rpc_method_handler(refuse)
