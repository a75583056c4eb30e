"""The errors of the SDK.

ClientError                    everything the SDK raises on purpose
├── ClientClosedError          the client was closed before the call
├── RequestError               refused here, before anything was sent (also a ValueError)
├── IncompleteAnswerError      the stream ended without its last message
└── by the gRPC status the server answered with:
    ├── BadRequestError        INVALID_ARGUMENT, OUT_OF_RANGE, FAILED_PRECONDITION, ALREADY_EXISTS
    ├── AuthenticationError    UNAUTHENTICATED, PERMISSION_DENIED
    ├── NotFoundError          NOT_FOUND
    ├── OverloadedError        RESOURCE_EXHAUSTED (with ``retry_after_s`` when the server gave one)
    ├── TimeoutExceededError   DEADLINE_EXCEEDED
    ├── CancelledError         CANCELLED
    ├── UnavailableError       UNAVAILABLE, ABORTED
    ├── UnsupportedError       UNIMPLEMENTED
    └── InternalServerError    INTERNAL, UNKNOWN, DATA_LOSS and anything a server should not answer with
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol

import grpc

from prismserve.core.errors import PrismServeError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

RETRY_AFTER_KEY: Final = "retry-after"
"""Trailing metadata: seconds until another attempt makes sense, as in HTTP's header."""
FIELD_KEY: Final = "prismserve-field"
"""Trailing metadata: the request field at fault."""
_PUSHBACK_KEY: Final = "grpc-retry-pushback-ms"


class RpcFailure(Protocol):
    """What a failed call tells, sync or async (``grpc.RpcError`` of a call, ``grpc.aio.AioRpcError``)."""

    def code(self) -> grpc.StatusCode:
        """The status."""
        ...

    def details(self) -> str | None:
        """The server's sentence."""
        ...

    def trailing_metadata(self) -> Iterable[tuple[str, str | bytes]] | None:
        """Key-value pairs sent with the status."""
        ...


class ClientError(PrismServeError):
    """Base of every error the SDK raises on purpose.

    Attributes:
        message: one sentence, the server's own where it sent one.
        field: the request field at fault, if known.
        code: the gRPC status, or None when the error arose here.
        retry_after_s: when the server said to try again, in seconds, or None.
    """

    def __init__(
        self,
        message: str,
        *,
        field: str | None = None,
        request_id: str | None = None,
        code: grpc.StatusCode | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message, field=field, request_id=request_id)
        self.code = code
        self.retry_after_s = retry_after_s


class ClientClosedError(ClientError):
    """The client was closed; make a new one."""


class RequestError(ClientError, ValueError):
    """The request is malformed; it was not sent."""


class IncompleteAnswerError(ClientError):
    """The stream ended without a finish reason."""


class BadRequestError(ClientError):
    """The server cannot serve the request as written."""


class AuthenticationError(ClientError):
    """The credential is missing, unknown or not allowed to do this."""


class NotFoundError(ClientError):
    """The model is not served there."""


class OverloadedError(ClientError):
    """The server's queues are full, or a message was over its size limit."""


class TimeoutExceededError(ClientError):
    """The deadline passed before the answer was complete."""


class CancelledError(ClientError):
    """The call was cancelled."""


class UnavailableError(ClientError):
    """The server cannot be reached or cannot serve now."""


class UnsupportedError(ClientError):
    """The server does not know this call; it is older or newer than this SDK."""


class InternalServerError(ClientError):
    """The server failed while serving the request."""


BY_STATUS: Final[Mapping[grpc.StatusCode, type[ClientError]]] = {
    grpc.StatusCode.INVALID_ARGUMENT: BadRequestError,
    grpc.StatusCode.OUT_OF_RANGE: BadRequestError,
    grpc.StatusCode.FAILED_PRECONDITION: BadRequestError,
    grpc.StatusCode.ALREADY_EXISTS: BadRequestError,
    grpc.StatusCode.UNAUTHENTICATED: AuthenticationError,
    grpc.StatusCode.PERMISSION_DENIED: AuthenticationError,
    grpc.StatusCode.NOT_FOUND: NotFoundError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: OverloadedError,
    grpc.StatusCode.DEADLINE_EXCEEDED: TimeoutExceededError,
    grpc.StatusCode.CANCELLED: CancelledError,
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
    grpc.StatusCode.ABORTED: UnavailableError,
    grpc.StatusCode.UNIMPLEMENTED: UnsupportedError,
    grpc.StatusCode.INTERNAL: InternalServerError,
    grpc.StatusCode.UNKNOWN: InternalServerError,
    grpc.StatusCode.DATA_LOSS: InternalServerError,
    grpc.StatusCode.OK: InternalServerError,
}


def from_rpc(failure: RpcFailure, *, request_id: str | None = None) -> ClientError:
    """Translate a failed call.

    Args:
        failure: the exception gRPC raised.
        request_id: the request it happened to, if it has one.
    """
    code = failure.code()
    metadata = {key: value for key, value in failure.trailing_metadata() or () if isinstance(value, str)}
    details = failure.details() or f"the server answered {code.name} without a message"
    return BY_STATUS.get(code, InternalServerError)(
        details,
        field=metadata.get(FIELD_KEY),
        request_id=request_id or None,
        code=code,
        retry_after_s=_retry_after_s(metadata),
    )


def _retry_after_s(metadata: Mapping[str, str]) -> float | None:
    for key, unit_s in ((RETRY_AFTER_KEY, 1.0), (_PUSHBACK_KEY, 0.001)):
        try:
            value = float(metadata.get(key, "")) * unit_s
        except ValueError:
            continue
        if 0 <= value < float("inf"):
            return value
    return None
