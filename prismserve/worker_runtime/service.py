"""The worker's data-plane gRPC service: thin, every decision is in the handlers."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

import grpc

from prismserve.core.errors import EngineError, PrismServeError
from prismserve.protocol import worker_pb2 as pb
from prismserve.protocol.worker_pb2_grpc import WorkerServicer
from prismserve.worker_runtime.jobs import failure, submission_from_proto

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from grpc import aio

    from prismserve.worker_runtime import sessions
    from prismserve.worker_runtime.runtime import WorkerRuntime

logger = logging.getLogger(__name__)

HELLO_TIMEOUT_S = 10.0


class WorkerService(WorkerServicer):
    """Serves routers and other workers.

    Args:
        runtime: the worker it belongs to.
    """

    def __init__(self, runtime: WorkerRuntime) -> None:
        self._runtime = runtime
        self._tasks: set[asyncio.Task[None]] = set()

    async def Session(  # noqa: N802 - the name in the schema
        self, request_iterator: AsyncIterator[pb.RouterMessage], context: aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[pb.WorkerMessage]:
        """One router's stream; ends when either side ends, and then cancels what the router left behind."""
        runtime = self._runtime
        try:
            first = await asyncio.wait_for(anext(request_iterator), HELLO_TIMEOUT_S)
        except (TimeoutError, StopAsyncIteration):
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the first message must be a hello")
        if first.WhichOneof("body") != "hello":
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the first message must be a hello")
        session = runtime.sessions.open(first.hello.router_id)
        reader = asyncio.create_task(self._read(request_iterator, session))
        try:
            yield pb.WorkerMessage(welcome=pb.Welcome(worker_id=runtime.info.worker_id, epoch=runtime.info.epoch))
            yield runtime.stats_message()
            while (message := await session.outbox.get()) is not None:
                yield message
        finally:
            reader.cancel()
            for ref in runtime.sessions.close(session):
                self._spawn(self._cancel(ref))

    async def _read(self, messages: AsyncIterator[pb.RouterMessage], session: sessions.Session) -> None:
        async for message in messages:
            match message.WhichOneof("body"):
                case "submit":
                    self._spawn(self._submit(message.submit, session))
                case "cancel":
                    ref = (message.cancel.request_id, message.cancel.attempt)
                    self._runtime.sessions.release(ref)
                    self._spawn(self._cancel(ref))
                case other:
                    logger.warning("router %s sent an unexpected %s", session.router_id, other)
        session.close()

    async def _submit(self, message: pb.Submit, session: sessions.Session) -> None:
        ref = (message.request.request_id, message.request.attempt)
        self._runtime.sessions.adopt(session, ref)
        try:
            submission = submission_from_proto(message)
            await self._runtime.handler(submission.job).submit(submission)
        except PrismServeError as error:
            self._runtime.sessions.deliver([failure(ref, error)])
        except Exception:  # a job's outermost frame: whatever went wrong, its caller must hear of it
            logger.exception("request %s attempt %d failed unexpectedly", *ref)
            self._runtime.sessions.deliver([failure(ref, EngineError("internal error in the worker"))])

    async def _cancel(self, ref: sessions.RequestRef) -> None:
        for handler in self._runtime.handlers:
            await handler.cancel(ref)

    def _spawn(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            logger.error("a job failed unexpectedly", exc_info=task.exception())

    async def Reserve(  # noqa: N802
        self, request: pb.ReserveRequest, context: aio.ServicerContext[Any, Any]
    ) -> pb.ReserveReply:
        """Room for one request's KV."""
        landing = self._runtime.landing
        if landing is None:
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, "this worker does not decode")
        return await landing.reserve(request)

    async def Commit(  # noqa: N802
        self, request: pb.CommitRequest, context: aio.ServicerContext[Any, Any]
    ) -> pb.CommitReply:
        """Verify what was written and start decoding."""
        landing = self._runtime.landing
        if landing is None:
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, "this worker does not decode")
        return await landing.commit(request)

    async def Push(  # noqa: N802
        self,
        request: pb.PushRequest,
        context: aio.ServicerContext[Any, Any],  # noqa: ARG002 - gRPC passes it
    ) -> pb.PushReply:
        """Write cached blocks or an embedding into the caller's extent."""
        try:
            return await self._runtime.exchange.serve(request)
        except PrismServeError as error:
            return pb.PushReply(found=False, refusal=error.message)

    async def Explain(  # noqa: N802
        self,
        request: pb.ExplainRequest,
        context: aio.ServicerContext[Any, Any],  # noqa: ARG002 - gRPC passes it
    ) -> pb.ExplainReply:
        """What would become of a request's visual tokens."""
        return await self._runtime.explainer.serve(request)
