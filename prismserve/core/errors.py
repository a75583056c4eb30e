"""The error tree.

PrismServeError
├── InvalidRequestError        the caller's input; HTTP 400, gRPC INVALID_ARGUMENT
│   ├── ContextLengthError     prompt longer than the model's context
│   └── UnknownMethodError     no such compression method, codec or preset
├── NotFoundError              unknown model; HTTP 404, gRPC NOT_FOUND
├── AuthenticationError        missing or wrong credential; HTTP 401
├── ForbiddenError             the credential does not allow this; HTTP 403
├── OverloadedError            bounded queue full; HTTP 429 with Retry-After
├── DeadlineExceededError      a wait reached its deadline; HTTP 504
├── RequestCancelledError      the caller went away
├── WorkerUnavailableError     no worker can serve now; HTTP 503
├── ConfigurationError         a setting, model directory or environment is unusable
│   └── ModelLoadError         the checkpoint cannot be loaded
├── EngineError                the engine could not run one request
│   └── OutOfBlocksError       the KV pool cannot hold the request at all
└── TransferError              KV could not be moved
    ├── ChecksumMismatchError  bytes differ from their manifest
    ├── LeaseExpiredError      the reservation ended, or belongs to another epoch
    ├── IncompatibleLayoutError the two sides hold KV that is not interchangeable
    └── TransportError         the link itself failed
IndexUnavailableError is a PrismServeError too: the index could not be reached; never fatal to a request.
"""

from __future__ import annotations


class PrismServeError(Exception):
    """Base of every error prismserve raises on purpose.

    Args:
        message: one sentence: what happened, and what to do about it.
        field: the request field or setting at fault, if there is one.
        request_id: the request it happened to, if there is one.
    """

    def __init__(self, message: str, *, field: str | None = None, request_id: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.request_id = request_id


class InvalidRequestError(PrismServeError):
    """The request cannot be served as written."""


class ContextLengthError(InvalidRequestError):
    """The prompt and the requested output do not fit the model's context."""


class UnknownMethodError(InvalidRequestError):
    """No compression method, codec or preset has this name; the message lists those there are."""


class NotFoundError(PrismServeError):
    """The named model is not served here."""


class AuthenticationError(PrismServeError):
    """The credential is missing or not known."""


class ForbiddenError(PrismServeError):
    """The credential is known but does not allow this."""


class OverloadedError(PrismServeError):
    """A bounded queue is full.

    Args:
        message: one sentence.
        retry_after_s: when trying again makes sense, in seconds.
    """

    def __init__(self, message: str, *, retry_after_s: float = 1.0, request_id: str | None = None) -> None:
        super().__init__(message, request_id=request_id)
        self.retry_after_s = retry_after_s


class DeadlineExceededError(PrismServeError):
    """A wait reached its deadline."""


class RequestCancelledError(PrismServeError):
    """The caller went away or cancelled."""


class WorkerUnavailableError(PrismServeError):
    """No worker can take the request now."""


class ConfigurationError(PrismServeError):
    """A setting, the model directory or the environment is unusable."""


class ModelLoadError(ConfigurationError):
    """The checkpoint cannot be loaded."""


class EngineError(PrismServeError):
    """The engine could not run one request."""


class OutOfBlocksError(EngineError):
    """The KV pool cannot hold this request even when it is alone."""


class TransferError(PrismServeError):
    """KV could not be moved between workers."""


class ChecksumMismatchError(TransferError):
    """The bytes that arrived differ from their manifest."""


class LeaseExpiredError(TransferError):
    """The reservation has ended or belongs to another epoch."""


class IncompatibleLayoutError(TransferError):
    """The two sides hold KV that is not interchangeable."""


class TransportError(TransferError):
    """The link between two workers failed."""


class IndexUnavailableError(PrismServeError):
    """The index cannot be reached; serving goes on with what is known locally."""


RETRYABLE_PREFIX = "retryable: "
"""Begins the text of an error that another placement may not repeat."""
OVERLOADED_PREFIX = "retryable: overloaded: "
"""The same, when the worker was only too busy."""
INVALID_PREFIX = "invalid: "
"""Begins the text of an error that is the caller's; only these are shown to clients."""

_RETRYABLE = (TransferError, DeadlineExceededError, WorkerUnavailableError)
_INVALID = (InvalidRequestError, OutOfBlocksError)


def outcome_text(error: PrismServeError) -> str:
    """How a worker words an error for the router: a prefix that says what may be done about it, then the sentence."""
    if isinstance(error, OverloadedError):
        return OVERLOADED_PREFIX + error.message
    if isinstance(error, _INVALID):
        return INVALID_PREFIX + error.message
    return (RETRYABLE_PREFIX if isinstance(error, _RETRYABLE) else "") + error.message
