"""The decode job: allocate blocks, grant room to the prefill worker, verify what arrived, start decoding."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from prismserve.compression.wire import Slots
from prismserve.core.errors import (
    ContextLengthError,
    DeadlineExceededError,
    EngineError,
    IncompatibleLayoutError,
    LeaseExpiredError,
    OutOfBlocksError,
    OverloadedError,
    PrismServeError,
    TransferError,
)
from prismserve.kv_transfer.conversion import Side, check_convertible, check_registered
from prismserve.kv_transfer.manifest import Expected
from prismserve.kv_transfer.plan import reserve_bytes, reserve_layers_bytes
from prismserve.protocol import convert
from prismserve.protocol import worker_pb2 as pb
from prismserve.worker_runtime.jobs import failure

if TYPE_CHECKING:
    from prismserve.core.types import KVLayout, Manifest, MethodSpec, PrefillReport, Request, Reservation
    from prismserve.engine.constraints import Matcher
    from prismserve.engine.engine import Engine, ImportTicket
    from prismserve.worker_runtime.jobs import Submission
    from prismserve.worker_runtime.runtime import WorkerRuntime
    from prismserve.worker_runtime.sessions import RequestRef

logger = logging.getLogger(__name__)

SUBMIT_WAIT_S = 5.0
"""How long a reservation may arrive before the router's submission of the same request."""
ADMIT_RETRY_S = 0.01
_PERMANENT = (ContextLengthError, OutOfBlocksError, IncompatibleLayoutError)


@dataclass(eq=False)
class Arrival:
    """One request on its way in."""

    request: Request
    ticket: asyncio.Future[ImportTicket]
    deadline: float
    reservation: Reservation | None = None
    committing: bool = False
    admission: asyncio.Task[None] | None = None
    timer: asyncio.TimerHandle | None = field(default=None)

    @property
    def ref(self) -> RequestRef:
        """Request id and attempt."""
        return self.request.request_id, self.request.attempt


class Landing:
    """All requests whose KV this worker waits for.

    Every arrival ends in one of three ways: committed into the engine, abandoned by its router, or expired.

    Args:
        runtime: the worker.
    """

    def __init__(self, runtime: WorkerRuntime) -> None:
        self._runtime = runtime
        self._arrivals: dict[RequestRef, Arrival] = {}
        self._expected: dict[RequestRef, asyncio.Event] = {}
        self._admitting = asyncio.Lock()
        self._endings: set[asyncio.Task[None]] = set()

    @property
    def waiting(self) -> int:
        """Requests whose KV has not been committed yet."""
        return len(self._arrivals)

    # ---- the router's side -------------------------------------------------------------------------------------

    async def submit(self, submission: Submission) -> None:
        """Expect this request's KV. A later attempt ends an earlier one."""
        request = submission.request
        if len(self._arrivals) >= self._runtime.config.engine.max_waiting:
            message = f"decode queue is full: {len(self._arrivals)} requests wait for KV"
            raise OverloadedError(message, request_id=request.request_id)
        for arrival in [a for a in self._arrivals.values() if a.request.request_id == request.request_id]:
            if arrival.request.attempt >= request.attempt:
                message = f"attempt {request.attempt} is older than attempt {arrival.request.attempt}"
                raise LeaseExpiredError(message, request_id=request.request_id)
            await self._abandon(arrival)
        loop = asyncio.get_running_loop()
        timeout_s = min(request.timeout_s, self._runtime.config.kv_wait_timeout_s)
        arrival = Arrival(request, loop.create_future(), time.monotonic() + timeout_s)
        self._arrivals[arrival.ref] = arrival
        arrival.admission = asyncio.create_task(self._admit(arrival))
        arrival.timer = loop.call_later(timeout_s, self._expire, arrival)
        event = self._expected.get(arrival.ref)
        if event is not None:
            event.set()

    async def cancel(self, ref: RequestRef) -> None:
        """The router is no longer interested. The engine itself is told by :class:`LocalJobs`."""
        arrival = self._arrivals.get(ref)
        if arrival is not None:
            await self._abandon(arrival)

    async def _admit(self, arrival: Arrival) -> None:
        """Allocate blocks, in order of arrival, as running requests free them."""
        try:
            matcher = await self._runtime.matcher(arrival.request)
            async with self._admitting:
                ticket = await self._allocate(arrival, matcher)
        except PrismServeError as error:
            self._forget(arrival)
            if not arrival.ticket.done():
                arrival.ticket.set_exception(error)
                arrival.ticket.exception()  # whoever waits sees it; nobody may be waiting
            self._runtime.sessions.deliver([failure(arrival.ref, error)])
            return
        except Exception:  # a task's outermost frame: the router must hear of it
            logger.exception("request %s attempt %d could not be admitted", *arrival.ref)
            await self._abandon(arrival)
            self._runtime.sessions.deliver([failure(arrival.ref, EngineError("internal error in the decode worker"))])
            return
        if arrival.ticket.done() or self._arrivals.get(arrival.ref) is not arrival:
            await self._runtime.on_engine(lambda engine: engine.abort_import(ticket))
            return
        arrival.ticket.set_result(ticket)

    async def _allocate(self, arrival: Arrival, matcher: Matcher | None) -> ImportTicket:
        """Blocks for one arrival, as soon as there are enough; OverloadedError at its deadline."""
        request = arrival.request
        while True:
            try:
                return await self._runtime.on_engine(lambda engine: engine.begin_import(request, matcher))
            except OverloadedError:
                if self._arrivals.get(arrival.ref) is not arrival or time.monotonic() > arrival.deadline:
                    raise
                await asyncio.sleep(ADMIT_RETRY_S)

    def _expire(self, arrival: Arrival) -> None:
        if self._arrivals.get(arrival.ref) is not arrival or arrival.committing:
            return
        error = DeadlineExceededError("no KV arrived in time", request_id=arrival.request.request_id)
        self._runtime.sessions.deliver([failure(arrival.ref, error)])
        task = asyncio.create_task(self._abandon(arrival))
        self._endings.add(task)
        task.add_done_callback(self._endings.discard)

    def _forget(self, arrival: Arrival) -> None:
        if self._arrivals.get(arrival.ref) is arrival:
            del self._arrivals[arrival.ref]
        if arrival.timer is not None:
            arrival.timer.cancel()

    async def _abandon(self, arrival: Arrival) -> None:
        """Release the lease and the blocks."""
        self._forget(arrival)
        if arrival.reservation is not None:
            self._runtime.receiver.cancel(arrival.reservation.lease_id)
        if arrival.ticket.done() and not arrival.ticket.cancelled() and arrival.ticket.exception() is None:
            ticket = arrival.ticket.result()
            await self._runtime.on_engine(lambda engine: engine.abort_import(ticket))
        else:
            arrival.ticket.cancel()

    # ---- the prefill worker's side -----------------------------------------------------------------------------

    async def reserve(self, message: pb.ReserveRequest) -> pb.ReserveReply:
        """Grant room for the tokens this worker does not hold."""
        try:
            arrival = await self._arrival((message.request_id, message.attempt))
            reservation = await self._grant(arrival, message)
        except PrismServeError as error:
            return pb.ReserveReply(granted=False, refusal=error.message, retryable=not isinstance(error, _PERMANENT))
        return convert.reservation_to_proto(reservation)

    async def _arrival(self, ref: RequestRef) -> Arrival:
        """The arrival of this request; the submission may be a little later than the reservation."""
        if ref not in self._arrivals:
            if len(self._expected) >= self._runtime.config.engine.max_waiting:
                message = "too many reservations for requests this worker was not told of"
                raise OverloadedError(message, request_id=ref[0])
            event = self._expected.setdefault(ref, asyncio.Event())
            try:
                await asyncio.wait_for(event.wait(), SUBMIT_WAIT_S)
            except TimeoutError:
                message = f"no router submitted request {ref[0]} attempt {ref[1]} here"
                raise LeaseExpiredError(message, request_id=ref[0]) from None
            finally:
                self._expected.pop(ref, None)
        arrival = self._arrivals.get(ref)
        if arrival is None:
            message = f"request {ref[0]} attempt {ref[1]} is over"
            raise LeaseExpiredError(message, request_id=ref[0])
        return arrival

    async def _grant(self, arrival: Arrival, message: pb.ReserveRequest) -> Reservation:
        runtime, request = self._runtime, arrival.request
        if message.target_epoch != runtime.info.epoch:
            text = f"reservation is for epoch {message.target_epoch}, this worker is in epoch {runtime.info.epoch}"
            raise LeaseExpiredError(text, request_id=request.request_id)
        codec = convert.method_from_proto(message.codec)
        layout = await self._source_layout(message, codec)
        try:
            ticket = await asyncio.wait_for(
                asyncio.shield(arrival.ticket), max(0.0, arrival.deadline - time.monotonic())
            )
        except (TimeoutError, asyncio.CancelledError):
            text = "no blocks became free in time"
            raise DeadlineExceededError(text, request_id=request.request_id) from None
        if message.prompt_tokens != ticket.prompt_tokens:
            text = f"the prompt has {ticket.prompt_tokens} tokens here and {message.prompt_tokens} at the sender"
            raise TransferError(text, request_id=request.request_id)
        expected = Expected(
            request_id=request.request_id,
            attempt=request.attempt,
            source_worker=message.source_worker,
            source_epoch=message.source_epoch,
            namespace=request.wire_namespace,
            codec=codec,
            prompt_tokens=ticket.prompt_tokens,
            cached_tokens=ticket.cached_tokens,
            source_layout=layout,
        )
        prompt_tokens = ticket.prompt_tokens
        if request.compression.prefill.name == "none":
            slots = Slots.of(request.prompt, prompt_tokens)
            nbytes = reserve_bytes(prompt_tokens - ticket.cached_tokens, codec, layout, slots)
        else:
            missing = max(0, ticket.room_tokens - ticket.cached_tokens * layout.layers)
            nbytes = reserve_layers_bytes(missing, codec, layout)
        arrival.reservation = runtime.receiver.reserve(expected, nbytes, runtime.engine.import_writer(ticket))
        return arrival.reservation

    async def _source_layout(self, message: pb.ReserveRequest, codec: MethodSpec) -> KVLayout:
        """The layout of the KV that will arrive: this worker's own, or one that it can convert."""
        runtime = self._runtime
        own = runtime.engine.layout
        if message.layout_fingerprint == own.fingerprint():
            return own
        peer = await runtime.peers.find(message.source_worker, message.source_epoch)
        source = Side(message.source_worker, peer.info.layout)
        check_registered(source, message.layout_fingerprint)
        check_convertible(source, Side(runtime.info.worker_id, own), codec)
        return source.layout

    async def commit(self, message: pb.CommitRequest) -> pb.CommitReply:
        """Start decoding if everything arrived and matches its manifest."""
        try:
            manifest = convert.manifest_from_proto(message.manifest)
            arrival = self._arrivals.get((manifest.request_id, manifest.attempt))
            if arrival is None or arrival.reservation is None or arrival.reservation.lease_id != message.lease_id:
                text = f"no lease {message.lease_id} for request {manifest.request_id} attempt {manifest.attempt}"
                raise LeaseExpiredError(text, request_id=manifest.request_id)
            await self._accept(arrival, manifest, message.generation, convert.report_from_proto(message.report))
        except PrismServeError as error:
            logger.warning("KV refused: %s", error.message)
            return pb.CommitReply(accepted=False, refusal=error.message, retryable=not isinstance(error, _PERMANENT))
        return pb.CommitReply(accepted=True)

    async def _accept(self, arrival: Arrival, manifest: Manifest, generation: int, report: PrefillReport) -> None:
        runtime, request = self._runtime, arrival.request
        ticket = arrival.ticket.result()
        arrival.committing = True
        began_s = time.monotonic()
        try:
            verified = runtime.receiver.commit(message_lease(arrival), generation, manifest)
            try:
                await asyncio.wait_for(asyncio.wrap_future(verified), runtime.config.peer_timeout_s)
            except TimeoutError:
                text = "the KV named in the manifest did not all arrive"
                raise DeadlineExceededError(text, request_id=request.request_id) from None
            if self._arrivals.get(arrival.ref) is not arrival:
                text = f"request {request.request_id} attempt {request.attempt} was cancelled"
                raise LeaseExpiredError(text, request_id=request.request_id)
            self._forget(arrival)
            await runtime.on_engine(lambda engine: _join(engine, ticket, request, manifest, report, began_s))
        except PrismServeError:
            await self._abandon(arrival)
            raise


def _join(
    engine: Engine, ticket: ImportTicket, request: Request, manifest: Manifest, report: PrefillReport, began_s: float
) -> None:
    """Let a request whose KV is verified decode; every look at the engine is in this one wait for its step to end."""
    if not engine.import_accepts(ticket, manifest.layer_tokens):
        text = (
            f"manifest covers {manifest.layer_tokens} tokens by layer, which does not fit the request's prompt "
            f"of {ticket.prompt_tokens}"
        )
        raise TransferError(text, request_id=request.request_id)
    # What the sender could not know: how long it took here, from its commit on.
    exposed_ms = report.transfer_exposed_ms + (time.monotonic() - began_s) * 1e3
    report = dataclasses.replace(report, transfer_exposed_ms=exposed_ms)
    engine.finish_import(
        ticket,
        request,
        manifest.first_token_ids,
        manifest.next_position,
        report,
        manifest.first_logprobs,
        layer_tokens=manifest.layer_tokens,
    )


def message_lease(arrival: Arrival) -> int:
    """The lease an arrival holds."""
    if arrival.reservation is None:
        text = "the arrival holds no lease"
        raise LeaseExpiredError(text, request_id=arrival.request.request_id)
    return arrival.reservation.lease_id
