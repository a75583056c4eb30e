"""Sending one request's KV into the pages another worker leased to it, layer by layer, while later layers compute."""

from __future__ import annotations

import logging
import threading
from collections import deque
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from typing import Final

import torch

from prismserve.compression.wire import Slots
from prismserve.core.errors import (
    DeadlineExceededError,
    LeaseExpiredError,
    OverloadedError,
    PrismServeError,
    RequestCancelledError,
    TransferError,
    TransportError,
)
from prismserve.core.types import KVLayout, MethodSpec, Payload, Reservation, WorkerInfo
from prismserve.kv_transfer.hub import TransportHub
from prismserve.kv_transfer.pieces import Batch, Cutter, KVRead, Piece, gather
from prismserve.kv_transfer.send_loop import Turn
from prismserve.kv_transfer.transports.base import StagedWrite, WriteHandle
from prismserve.kv_transfer.wire import encode_end, encode_payloads

_RETRY_PAUSE_S: Final = 0.01
_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Write:
    batch: Batch
    handle: WriteHandle
    transport: str
    started_s: float


class Outgoing:
    """One transfer to one reservation.

    ``push*`` return at once and never raise for what happens to the transfer: the first failure ends it, ``error``
    tells at once, ``finish`` raises it, and the receiver is told that nothing more will be written. Call ``push*``
    from one thread; everything else is thread-safe.

    Args:
        hub: of this worker.
        target: the receiver, from the cluster's registry.
        reservation: what it granted. Writing stops ``ttl_s`` after this object was made.
        codec: normalised spec the receiver was told to expect; UnknownMethodError if there is no such codec.
        layout: of the KV that is pushed.
        slots: what the cache slots hold, for codecs that treat text and images differently or keep a residual window;
            None encodes everything as images are. The receiver must have reserved by the same.
    """

    def __init__(
        self,
        hub: TransportHub,
        target: WorkerInfo,
        reservation: Reservation,
        codec: MethodSpec,
        layout: KVLayout,
        slots: Slots | None = None,
    ) -> None:
        self._hub = hub
        self._target = target
        self._reservation = reservation
        self._cutter = Cutter(codec, layout, hub.config.write_bytes_max)
        self._layout = layout
        self._slots = slots
        self._deadline_s = hub.clock() + reservation.ttl_s
        self._lock = threading.Lock()
        self._pieces: deque[Piece] = deque()
        self._writes: list[_Write] = []
        self._payloads: list[Payload] = []
        self._cursor = 0
        self._stalled_since_s: float | None = None
        self._complete = False
        self._error: BaseException | None = None
        self._done: Future[tuple[Payload, ...]] = Future()
        # Running from the start: a caller that stops waiting must not be able to cancel it under the send thread.
        self._done.set_running_or_notify_cancel()
        self._succeeded = False
        self._farewell: WriteHandle | None = None
        self._started_s: float | None = None
        self._completed_s: float | None = None
        self.bytes_sent = 0
        self.raw_bytes = 0
        self.transport = ""
        self.write_seconds = 0.0
        self.exposed_seconds = 0.0
        hub.sender.add(self)

    @property
    def error(self) -> BaseException | None:
        """Why the transfer failed; None while it has not."""
        return self._error

    def push(self, layer: int, start_token: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Send one run of tokens of one layer; the tensors must not change until :meth:`finish` returns.

        Args:
            layer: decoder layer.
            start_token: cache slot of the first token; slots the receiver holds already are left out.
            keys: [T, kv_heads, head_dim] in the layout's dtype, or rows as :class:`KVRead` gives them.
            values: as ``keys``.
        """
        origin = start_token

        def read(layer: int, start_token: int, tokens: int, *, rows: bool) -> tuple[torch.Tensor, torch.Tensor]:
            del layer, rows  # the tensors are what they are
            first = start_token - origin
            return keys[first : first + tokens], values[first : first + tokens]

        self.push_from(layer, start_token, keys.shape[0], read)

    def push_from(self, layer: int, start_token: int, tokens: int, read: KVRead, slots: Slots | None = None) -> None:
        """As :meth:`push`, but the tensors are fetched on the send thread; the cheapest call for an engine thread.

        ``slots`` says what this layer's slots hold where that is not the same in every layer.
        """
        skipped = max(0, min(tokens, self._reservation.cached_tokens - start_token))
        start, count = start_token + skipped, tokens - skipped
        if count < 1:
            return
        pieces = self._cutter.kv(layer, start, count, read, slots or self._slots)
        self._enqueue(list(pieces), count * self._layout.token_layer_bytes)

    def push_bytes(self, start_token: int, tokens: torch.Tensor) -> None:
        """Send an image embedding as it is: payload layer -1.

        Args:
            start_token: index of the first row in the embedding.
            tokens: [k, D], contiguous, CPU; must not change until :meth:`finish` returns.
        """
        self._enqueue(list(self._cutter.raw(start_token, tokens)), tokens.nbytes)

    def _enqueue(self, pieces: list[Piece], raw_bytes: int) -> None:
        limit = self._hub.config.pieces_queued_max
        overflow = False
        with self._lock:
            if self._error is not None:
                return
            if self._complete:
                message = "KV was pushed after the transfer was declared complete"
                raise TransferError(message)
            if self._started_s is None:
                self._started_s = self._hub.clock()
            overflow = len(self._pieces) + len(pieces) > limit
            if not overflow:
                self._pieces.extend(pieces)
                self.raw_bytes += raw_bytes
        if overflow:
            self._stop(OverloadedError(f"{limit} pieces of one transfer wait to be sent"))
        self._hub.sender.wake()

    def complete(self) -> Future[tuple[Payload, ...]]:
        """Declare that nothing more will be pushed; resolves to the payloads once all are with the receiver."""
        with self._lock:
            if not self._complete:
                self._complete = True
                self._completed_s = self._hub.clock()
        self._hub.sender.wake()
        return self._done

    def finish(self, timeout_s: float) -> tuple[Payload, ...]:
        """As :meth:`complete`, waiting.

        Raises:
            DeadlineExceededError: not done in time; the transfer is cancelled.
            LeaseExpiredError: the reservation ran out.
            TransportError: every link failed.
            RequestCancelledError: :meth:`cancel` was called.
        """
        try:
            return self.complete().result(timeout_s)
        except FutureTimeoutError:
            self._stop(DeadlineExceededError(f"the transfer did not finish within {timeout_s} s"))
            return self._done.result(0)

    def cancel(self) -> None:
        """Stop writing; returns at once. The receiver is told when the last write has ended."""
        self._stop(RequestCancelledError("the transfer was cancelled"))

    def fail(self, error: BaseException) -> None:
        """End with an error and let go of every write (the send loop's way to give up on a transfer)."""
        self._stop(error)
        self._release_writes()

    def _stop(self, error: BaseException) -> None:
        with self._lock:
            if self._error is not None or self._succeeded:
                return
            self._error = error
            self._pieces.clear()
        self._done.set_exception(error)
        self._hub.sender.wake()

    # ---- the send thread ------------------------------------------------------------------------------------------

    def advance(self) -> Turn:
        """One turn: look after writes in flight, then encode and submit at most one piece. Send thread only."""
        if self._error is not None:
            return self._say_farewell()
        now_s = self._hub.clock()
        if now_s >= self._deadline_s:
            self._stop(LeaseExpiredError(f"the reservation at worker {self._target.worker_id} ran out while sending"))
            return Turn.WORKED
        worked = self._poll_writes()
        with self._lock:
            waiting = bool(self._pieces)
            if self._complete and not waiting and not self._writes and self._error is None:
                self._succeeded = True
        if self._succeeded:
            return self._succeed(now_s)
        if waiting and len(self._writes) < self._hub.config.writes_inflight_max and self._start(now_s):
            worked = True
        if worked:
            return Turn.WORKED
        return Turn.WAITING if waiting or self._writes else Turn.IDLE

    def _succeed(self, now_s: float) -> Turn:
        if self._started_s is not None:
            self.write_seconds = now_s - self._started_s
        if self._completed_s is not None:
            self.exposed_seconds = max(0.0, now_s - self._completed_s)
        self._payloads.sort(key=lambda payload: (payload.layer, payload.start_token))
        self._done.set_result(tuple(self._payloads))
        return Turn.OVER

    def _poll_writes(self) -> bool:
        progressed = False
        for write in list(self._writes):
            try:
                if not write.handle.poll():
                    continue
            except TransportError as error:
                self._writes.remove(write)
                self._retry(write.batch, write.transport, error)
                progressed = True
                continue
            self._writes.remove(write)
            progressed = True
            nbytes = 0
            for payload in write.batch.payloads:
                self._payloads.append(payload)
                nbytes += payload.encoded_bytes
            self.bytes_sent += nbytes
            self._hub.succeeded(self._target, write.transport, nbytes, write.started_s)
        return progressed

    def _start(self, now_s: float) -> bool:
        """Encode and submit what is at the head of the queue; False if it must wait."""
        link_name = ""
        batch: Batch | None = None
        try:
            batch = self._gather(now_s)
            if batch is None:
                return False
            link = self._hub.connect(self._target)
            link_name = link.transport
            start_bytes = self._reservation.extent.first_page * self._reservation.page_bytes
            staged = link.stage(start_bytes + batch.offset_bytes, batch.nbytes)
        except OverloadedError as error:
            return self._stall(error)
        except TransportError as error:
            if batch is not None:
                self._take(batch)
                self._retry(batch, link_name, error)
            return True
        except PrismServeError as error:
            self._stop(error)
            return True
        self._stalled_since_s = None
        self._take(batch)
        encoded = False
        try:
            self._cutter.encode(batch, staged.buffer)
            encoded = True
        except (PrismServeError, RuntimeError, ValueError, TypeError, LookupError) as error:
            self._stop(error if isinstance(error, PrismServeError) else _encode_failure(batch, error))
            return True
        finally:
            if not encoded:
                staged.discard()
        self._submit(batch, staged, link_name)
        return True

    def _gather(self, now_s: float) -> Batch | None:
        room = self._reservation.extent.pages * self._reservation.page_bytes
        with self._lock:
            batch, self._cursor = gather(self._pieces, self._cursor, room, self._hub.config.coalesce_bytes, now_s)
        return batch

    def _submit(self, batch: Batch, staged: StagedWrite, transport: str) -> None:
        lease_id, generation = self._reservation.lease_id, self._reservation.extent.generation
        started_s = self._hub.clock()
        try:
            handle = staged.submit(encode_payloads(lease_id, generation, batch.payloads))
        except TransportError as error:
            self._retry(batch, transport, error)
            return
        self.transport = transport
        self._writes.append(_Write(batch, handle, transport, started_s))

    def _take(self, batch: Batch) -> None:
        with self._lock:
            for piece in batch.pieces:
                if self._pieces and self._pieces[0] is piece:
                    self._pieces.popleft()

    def _retry(self, batch: Batch, transport: str, error: TransportError) -> None:
        """Put the pieces back, to go over the next link; the same bytes at the same place: repeating is harmless."""
        if transport:
            self._hub.failed(self._target, transport)
        _log.warning("a KV write to worker %s over %s failed: %s", self._target.worker_id, transport or "-", error)
        for piece in batch.pieces:
            piece.payload = None
            piece.attempts += 1
            piece.not_before_s = self._hub.clock() + _RETRY_PAUSE_S * 2**piece.attempts
        if max(piece.attempts for piece in batch.pieces) >= self._hub.config.write_attempts:
            self._stop(error)
            return
        with self._lock:
            if self._error is None:
                self._pieces.extendleft(reversed(batch.pieces))

    def _stall(self, error: OverloadedError) -> bool:
        now_s = self._hub.clock()
        if self._stalled_since_s is None:
            self._stalled_since_s = now_s
        if now_s - self._stalled_since_s < self._hub.config.write_timeout_s:
            return False
        self._stop(error)
        return True

    def _say_farewell(self) -> Turn:
        """After a failure: end the writes, then tell the receiver that its pages are its own again."""
        self._release_writes()
        try:
            if self._farewell is None:
                raw = encode_end(self._reservation.lease_id, self._reservation.extent.generation)
                self._farewell = self._hub.connect(self._target).notify(raw)
            return Turn.OVER if self._farewell.poll() else Turn.WAITING
        except PrismServeError as error:
            _log.info("worker %s was not told that a transfer ended: %s", self._target.worker_id, error)
            return Turn.OVER

    def _release_writes(self) -> None:
        for write in self._writes:
            write.handle.cancel()
        self._writes.clear()
        with self._lock:
            self._pieces.clear()


def _encode_failure(batch: Batch, error: Exception) -> TransferError:
    first = batch.pieces[0]
    failure = TransferError(f"layer {first.layer}, from token {first.start_token} on, cannot be encoded: {error}")
    failure.__cause__ = error
    return failure
