"""How errors leave the front doors: HTTP status, OpenAI error object, gRPC status, always the same message.

Only messages of our own error tree are shown. Anything else becomes a bare internal error, so that no path, address
or traceback ever reaches a caller.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import grpc

from prismserve.core.errors import (
    AuthenticationError,
    ContextLengthError,
    DeadlineExceededError,
    EngineError,
    ForbiddenError,
    InvalidRequestError,
    NotFoundError,
    OverloadedError,
    PrismServeError,
    RequestCancelledError,
    UnknownMethodError,
    WorkerUnavailableError,
)


class BodyTooLargeError(InvalidRequestError):
    """The body exceeds the cap; HTTP 413."""


class BodyTimeoutError(InvalidRequestError):
    """The body did not arrive in time; HTTP 408."""


@dataclass(frozen=True, slots=True)
class Failure:
    """One error as the outside sees it.

    Attributes:
        status: HTTP status.
        kind: OpenAI's ``type``.
        code: OpenAI's ``code``, or None.
        param: the field at fault, or None.
        retry_after_s: when trying again makes sense, or None.
    """

    status: int
    kind: str
    code: str | None
    grpc_code: grpc.StatusCode
    message: str
    param: str | None = None
    retry_after_s: float | None = None

    def openai(self) -> dict[str, Any]:
        """OpenAI's error object."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


_Row = tuple[type[PrismServeError], int, str, str | None, grpc.StatusCode]
_BAD: Final = "invalid_request_error"
_SERVER: Final = "server_error"
# The first row whose class matches decides: subclasses stand before their bases.
_ROWS: Final[tuple[_Row, ...]] = (
    (BodyTooLargeError, 413, _BAD, "request_too_large", grpc.StatusCode.RESOURCE_EXHAUSTED),
    (BodyTimeoutError, 408, _BAD, "request_timeout", grpc.StatusCode.DEADLINE_EXCEEDED),
    (ContextLengthError, 400, _BAD, "context_length_exceeded", grpc.StatusCode.INVALID_ARGUMENT),
    (UnknownMethodError, 400, _BAD, "unknown_method", grpc.StatusCode.INVALID_ARGUMENT),
    (InvalidRequestError, 400, _BAD, "invalid_value", grpc.StatusCode.INVALID_ARGUMENT),
    (NotFoundError, 404, _BAD, "model_not_found", grpc.StatusCode.NOT_FOUND),
    (AuthenticationError, 401, "authentication_error", "invalid_api_key", grpc.StatusCode.UNAUTHENTICATED),
    (ForbiddenError, 403, "permission_error", "forbidden", grpc.StatusCode.PERMISSION_DENIED),
    (OverloadedError, 429, "rate_limit_error", "overloaded", grpc.StatusCode.RESOURCE_EXHAUSTED),
    (DeadlineExceededError, 504, _SERVER, "timeout", grpc.StatusCode.DEADLINE_EXCEEDED),
    (RequestCancelledError, 499, _BAD, "cancelled", grpc.StatusCode.CANCELLED),
    (WorkerUnavailableError, 503, _SERVER, "unavailable", grpc.StatusCode.UNAVAILABLE),
    (EngineError, 500, _SERVER, "engine_error", grpc.StatusCode.INTERNAL),
)
INTERNAL: Final = Failure(
    500, _SERVER, "internal_error", grpc.StatusCode.INTERNAL, "an internal error occurred; the server's log has details"
)


def failure_of(error: BaseException) -> Failure:
    """What the outside is told about ``error``."""
    for kind, status, name, code, grpc_code in _ROWS:
        if isinstance(error, kind):
            retry_after_s = error.retry_after_s if isinstance(error, OverloadedError) else None
            if status == 503:
                retry_after_s = 1.0
            return Failure(status, name, code, grpc_code, error.message, error.field, retry_after_s)
    return INTERNAL
