"""Asks a worker what would become of a request's visual tokens."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import grpc

from prismserve.core.errors import (
    INVALID_PREFIX,
    OVERLOADED_PREFIX,
    RETRYABLE_PREFIX,
    DeadlineExceededError,
    EngineError,
    InvalidRequestError,
    OverloadedError,
    WorkerUnavailableError,
)
from prismserve.core.types import Role, WorkerState
from prismserve.protocol import worker_pb2 as pb
from prismserve.protocol.channel import open_channel, secret_metadata
from prismserve.protocol.convert import request_to_proto
from prismserve.protocol.worker_pb2_grpc import WorkerStub
from prismserve.worker_runtime.explaining import explanation_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from prismserve.compression.explanation import Explanation
    from prismserve.core.types import Request, WorkerInfo
    from prismserve.router.sessions import WorkerSession

logger = logging.getLogger(__name__)


def choose_worker(sessions: Sequence[WorkerSession]) -> WorkerInfo:
    """The ready worker with least to do, one that prefills if there is any; WorkerUnavailableError if none is ready."""
    ready = [session for session in sessions if session.state is WorkerState.READY]
    if not ready:
        message = "no worker can explain a request now; try again shortly"
        raise WorkerUnavailableError(message)

    def burden(session: WorkerSession) -> tuple[bool, int, str]:
        load = session.in_flight + session.stats.running + session.stats.waiting
        return session.info.role is Role.DECODE, load, session.info.worker_id

    return min(ready, key=burden).info


async def ask_worker(worker: WorkerInfo, request: Request, secret: str, timeout_s: float) -> Explanation:
    """The explanation of a request.

    Args:
        worker: who is asked; all of one model explain alike.
        request: as it would be served.
        secret: the cluster's.
        timeout_s: for the whole call, in seconds.

    Raises:
        InvalidRequestError: nothing of it can be explained.
        OverloadedError: the worker explains another one.
        DeadlineExceededError, WorkerUnavailableError: it did not answer.
        EngineError: it could not.
    """
    message = pb.ExplainRequest(request=request_to_proto(request))
    async with open_channel(worker.control_address) as channel:
        call = WorkerStub(channel).Explain  # type: ignore[no-untyped-call]
        try:
            reply: pb.ExplainReply = await call(message, timeout=timeout_s, metadata=secret_metadata(secret))
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                text = "the request was not explained within its time limit"
                raise DeadlineExceededError(text, request_id=request.request_id) from None
            logger.warning("worker %s did not explain a request: %s", worker.worker_id, error.code().name)
            text = "the worker that was to explain the request did not answer; try again"
            raise WorkerUnavailableError(text, request_id=request.request_id) from None
    if reply.refusal:
        raise _refusal(worker, request, reply.refusal)
    return explanation_of(reply)


def _refusal(worker: WorkerInfo, request: Request, text: str) -> Exception:
    """What a worker's refusal means; only those behind ``INVALID_PREFIX`` are shown."""
    if text.startswith(INVALID_PREFIX):
        return InvalidRequestError(text.removeprefix(INVALID_PREFIX), request_id=request.request_id)
    if text.startswith(OVERLOADED_PREFIX):
        return OverloadedError("another request is being explained; try again shortly", request_id=request.request_id)
    logger.error("worker %s could not explain request %s: %s", worker.worker_id, request.request_id, text)
    if text.startswith(RETRYABLE_PREFIX):
        return WorkerUnavailableError(
            "the request could not be explained now; try again", request_id=request.request_id
        )
    return EngineError("the engine could not explain this request", request_id=request.request_id)
