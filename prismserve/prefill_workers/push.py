"""The prefill job: reserve room at the decode worker, prefill, push each layer, commit the manifest."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from typing import TYPE_CHECKING, TypeVar

from prismserve.compression.wire import Slots
from prismserve.core.errors import (
    DeadlineExceededError,
    EngineError,
    LeaseExpiredError,
    OverloadedError,
    PrismServeError,
)
from prismserve.core.types import FinishReason, PrefillReport, TokenOutput
from prismserve.kv_transfer.manifest import Expected, build
from prismserve.kv_transfer.sender import Outgoing
from prismserve.prefill_workers.export import Export
from prismserve.protocol import convert
from prismserve.protocol import worker_pb2 as pb
from prismserve.worker_runtime.exchange import Fetched
from prismserve.worker_runtime.jobs import failure

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from prismserve.core.types import Reservation
    from prismserve.engine.engine import ExportView
    from prismserve.worker_runtime.jobs import Submission
    from prismserve.worker_runtime.peers import Peer
    from prismserve.worker_runtime.runtime import WorkerRuntime
    from prismserve.worker_runtime.sessions import RequestRef

T = TypeVar("T")

logger = logging.getLogger(__name__)


class PrefillJobs:
    """All prefills this worker pushes elsewhere.

    Args:
        runtime: the worker.
    """

    def __init__(self, runtime: WorkerRuntime) -> None:
        self._runtime = runtime
        self._jobs: dict[RequestRef, asyncio.Task[None]] = {}

    async def submit(self, submission: Submission) -> None:
        """Begin one; failures are reported to the router, successes to the decode worker."""
        if len(self._jobs) >= self._runtime.config.engine.max_waiting:
            message = f"prefill queue is full: {len(self._jobs)} requests"
            raise OverloadedError(message, request_id=submission.request.request_id)
        task = asyncio.create_task(self._guard(submission), name=f"prefill {submission.ref}")
        self._jobs[submission.ref] = task
        task.add_done_callback(lambda _: self._jobs.pop(submission.ref, None))

    async def cancel(self, ref: RequestRef) -> None:
        """Stop one and release what it holds."""
        task = self._jobs.get(ref)
        if task is not None:
            task.cancel()
            await asyncio.wait([task], timeout=self._runtime.config.peer_timeout_s)

    async def _guard(self, submission: Submission) -> None:
        ref = submission.ref
        try:
            await PushJob(self._runtime, submission).run()
            self._runtime.sessions.release(ref)
        except PrismServeError as error:
            self._runtime.exchange.counters.failures += 1
            logger.warning("prefill of %s attempt %d failed: %s", *ref, error.message)
            self._runtime.sessions.deliver([failure(ref, error)])
        except Exception:  # the job's outermost frame: whatever went wrong, the router must hear of it
            logger.exception("prefill of %s attempt %d failed unexpectedly", *ref)
            self._runtime.sessions.deliver([failure(ref, EngineError("internal error in the prefill worker"))])


class PushJob:
    """One prefill and its handoff.

    Args:
        runtime: the worker.
        submission: what the router placed here.
    """

    def __init__(self, runtime: WorkerRuntime, submission: Submission) -> None:
        self._runtime = runtime
        self._submission = submission
        self._request = submission.request
        self._export = Export(runtime.engine.pool)
        self._first: asyncio.Future[TokenOutput] = asyncio.get_running_loop().create_future()
        self._outgoing: Outgoing | None = None
        self._fetched = Fetched(0.0, 0, 0)
        self._deadline = time.monotonic() + submission.request.timeout_s

    async def run(self) -> None:
        """Do all of it; on any failure everything held is released before the error is raised."""
        runtime, request, ref = self._runtime, self._request, self._submission.ref
        runtime.tap(ref, self._receive)
        done = False
        grant: asyncio.Task[tuple[Peer, Reservation]] | None = None
        try:
            self._fetched = await runtime.exchange.fetch(self._submission, "prefill")
            grant = asyncio.create_task(self._reserve())
            matcher = await runtime.matcher(request)
            await runtime.on_engine(
                lambda engine: engine.submit(request, worker="prefill", sink_factory=self._export.open, matcher=matcher)
            )
            peer, reservation = await self._within(grant, "the decode worker's reservation")
            output = await self._within(self._first, "prefill")
            if output.finish_reason is FinishReason.ERROR:
                raise EngineError(output.error, request_id=request.request_id)
            await self._commit(peer, reservation, output)
            done = True
        finally:
            runtime.untap(ref)
            if grant is not None:
                grant.cancel()
                await asyncio.wait([grant], timeout=runtime.config.peer_timeout_s)
                if grant.done() and not grant.cancelled():
                    grant.exception()  # the job's own error says what went wrong; this one may be its echo
            self._export.cancel()
            if self._outgoing is not None and not done:
                self._outgoing.cancel()
            await asyncio.shield(runtime.on_engine(lambda _: self._release(cancel=not done)))

    def _release(self, *, cancel: bool) -> None:
        engine = self._runtime.engine
        if cancel:
            engine.cancel(*self._submission.ref)
        engine.release_export(*self._submission.ref)

    def _receive(self, output: TokenOutput) -> None:
        if not self._first.done():
            self._first.set_result(output)

    async def _within(self, work: Awaitable[T], what: str) -> T:
        """Wait until the request's deadline."""
        try:
            return await asyncio.wait_for(work, max(0.0, self._deadline - time.monotonic()))
        except TimeoutError:
            message = f"{what} was not ready before the request's deadline"
            raise DeadlineExceededError(message, request_id=self._request.request_id) from None

    async def _reserve(self) -> tuple[Peer, Reservation]:
        """Ask the decode worker for room and start pushing what is ready."""
        runtime, request, submission = self._runtime, self._request, self._submission
        layout = runtime.engine.layout
        peer = await runtime.peers.find(submission.target_worker, submission.target_epoch)
        message = pb.ReserveRequest(
            request_id=request.request_id,
            attempt=request.attempt,
            source_worker=runtime.info.worker_id,
            source_epoch=runtime.info.epoch,
            target_epoch=submission.target_epoch,
            layout_fingerprint=layout.fingerprint(),
            wire_namespace=request.wire_namespace,
            codec=convert.method_to_proto(request.compression.wire),
            prompt_tokens=request.prompt.tokens + len(request.resume_token_ids),
        )
        reply = await peer.reserve(message, min(runtime.config.kv_wait_timeout_s, request.timeout_s))
        if not reply.granted:
            kind = LeaseExpiredError if reply.retryable else EngineError
            raise kind(
                f"worker {submission.target_worker} refused room: {reply.refusal}", request_id=request.request_id
            )
        reservation = convert.reservation_from_proto(reply)
        slots = Slots.of(request.prompt, message.prompt_tokens)
        self._outgoing = Outgoing(runtime.hub, peer.info, reservation, request.compression.wire, layout, slots)
        self._export.attach(self._outgoing)
        return peer, reservation

    async def _layer_tokens(self, view: ExportView) -> tuple[int, ...]:
        """Slots of each layer, now that the prefill is over.

        Without a prefill method they were known when the blocks were allocated. The engine is not asked then: it may
        have begun a step for other requests, and this one's first token would wait for its end.
        """
        if self._request.compression.prefill.name == "none":
            return view.layer_tokens
        return await self._runtime.on_engine(lambda engine: engine.export_view(*self._submission.ref).layer_tokens)

    async def _commit(self, peer: Peer, reservation: Reservation, output: TokenOutput) -> None:
        """Wait for the last write, state what was written, and have the decode worker accept it."""
        runtime, request, outgoing, view = self._runtime, self._request, self._outgoing, self._export.view
        if outgoing is None or view is None:
            message = "the prefill ended without blocks or without a reservation"
            raise EngineError(message, request_id=request.request_id)
        timeout_s = runtime.config.peer_timeout_s
        layer_tokens = await self._layer_tokens(view)
        self._export.complete(layer_tokens)
        payloads = await self._within(asyncio.wrap_future(outgoing.complete()), "the last write")
        expected = Expected(
            request_id=request.request_id,
            attempt=request.attempt,
            source_worker=runtime.info.worker_id,
            source_epoch=runtime.info.epoch,
            namespace=request.wire_namespace,
            codec=request.compression.wire,
            prompt_tokens=view.prompt_tokens,
            cached_tokens=reservation.cached_tokens,
        )
        manifest = build(
            expected,
            runtime.engine.layout,
            payloads,
            layer_tokens=layer_tokens,
            next_position=view.next_position,
            first_token_ids=output.token_ids,
            first_logprobs=output.logprobs,
        )
        report = dataclasses.replace(
            self._fetched.into(output.report or PrefillReport()),
            worker_id=runtime.info.worker_id,
            kv_bytes_sent=outgoing.bytes_sent,
            transfer_ms=outgoing.write_seconds * 1e3,
            transfer_exposed_ms=outgoing.exposed_seconds * 1e3,
            transport=outgoing.transport or "none",
        )
        reply = await peer.commit(
            pb.CommitRequest(
                lease_id=reservation.lease_id,
                generation=reservation.extent.generation,
                manifest=convert.manifest_to_proto(manifest),
                report=convert.report_to_proto(report),
            ),
            timeout_s,
        )
        if not reply.accepted:
            kind = LeaseExpiredError if reply.retryable else EngineError
            raise kind(f"worker {peer.info.worker_id} refused the KV: {reply.refusal}", request_id=request.request_id)
        runtime.exchange.counters.sent(outgoing)
