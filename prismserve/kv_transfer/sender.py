"""Sending one request's KV into the pages another worker leased to it, layer by layer, while later layers compute."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeAlias, runtime_checkable

import torch

from prismserve.compression import loader
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
from prismserve.kv_transfer.plan import RAW_LAYER, aligned, cut
from prismserve.kv_transfer.send_loop import Turn
from prismserve.kv_transfer.transports.base import StagedWrite, WriteHandle
from prismserve.kv_transfer.wire import checksum, encode_end, encode_payload

KVRead: TypeAlias = Callable[[int, int, int], tuple[torch.Tensor, torch.Tensor]]
"""(layer, start_token, tokens) -> keys and values [tokens, kv_heads, head_dim]; runs on the send thread.

Where the codec is exact and the layout quantised, rows as they lie in memory, uint8 [tokens, kv_heads, row_bytes].
"""
_RETRY_PAUSE_S: Final = 0.01
_log = logging.getLogger(__name__)


@runtime_checkable
class EncodesInto(Protocol):
    """A codec that can write into given memory, so that a same-node transfer copies once."""

    def encode_into(self, keys: torch.Tensor, values: torch.Tensor, config: Any, out: torch.Tensor) -> None:
        """As ``Codec.encode``, into ``out`` (uint8, exactly ``encoded_bytes`` long)."""
        ...


@dataclass(slots=True)
class _Piece:
    """What becomes one payload; ``offset_bytes`` is set when it is first staged and kept over retries."""

    layer: int
    start_token: int
    tokens: int
    nbytes: int
    read: KVRead | None
    raw: torch.Tensor | None = None
    offset_bytes: int = -1
    attempts: int = 0
    not_before_s: float = 0.0
    payload: Payload | None = None


@dataclass(slots=True)
class _Write:
    piece: _Piece
    handle: WriteHandle
    transport: str


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
    """

    def __init__(
        self, hub: TransportHub, target: WorkerInfo, reservation: Reservation, codec: MethodSpec, layout: KVLayout
    ) -> None:
        self._hub = hub
        self._target = target
        self._reservation = reservation
        self._codec = loader.codec(codec.name)
        self._codec_config = loader.config_of(codec, "codec")
        self._layout = layout
        self._deadline_s = hub.clock() + reservation.ttl_s
        self._lock = threading.Lock()
        self._pieces: deque[_Piece] = deque()
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

    @property
    def exact(self) -> bool:
        """Whether the codec moves what lies in memory, rather than numbers that it rounds."""
        return not self._codec.lossy

    def push(self, layer: int, start_token: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Send one run of tokens of one layer; the tensors must not change until :meth:`finish` returns.

        Args:
            layer: decoder layer.
            start_token: cache slot of the first token; slots the receiver holds already are left out.
            keys: [T, kv_heads, head_dim] in the layout's dtype, or rows as :data:`KVRead` gives them.
            values: as ``keys``.
        """

        def read(_: int, start: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
            first = start - start_token
            return keys[first : first + tokens], values[first : first + tokens]

        self.push_from(layer, start_token, keys.shape[0], read)

    def push_from(self, layer: int, start_token: int, tokens: int, read: KVRead) -> None:
        """As :meth:`push`, but the tensors are fetched on the send thread; the cheapest call for an engine thread."""
        skipped = max(0, min(tokens, self._reservation.cached_tokens - start_token))
        start, count = start_token + skipped, tokens - skipped
        if count < 1:
            return
        config = self._hub.config
        token_bytes = self._layout.token_layer_bytes
        self._enqueue(
            [
                _Piece(layer, first, length, self._encoded_bytes(length), read)
                for first, length in cut(start, count, token_bytes, config.write_bytes_max)
            ],
            count * token_bytes,
        )

    def push_bytes(self, start_token: int, tokens: torch.Tensor) -> None:
        """Send an image embedding as it is: payload layer -1.

        Args:
            start_token: index of the first row in the embedding.
            tokens: [k, D], contiguous, CPU; must not change until :meth:`finish` returns.
        """
        raw = tokens.contiguous().view(torch.uint8).reshape(-1)
        row_bytes = raw.numel() // max(1, tokens.shape[0])
        pieces = [
            _Piece(
                RAW_LAYER,
                start_token + first,
                length,
                length * row_bytes,
                None,
                raw[first * row_bytes : (first + length) * row_bytes],
            )
            for first, length in cut(0, tokens.shape[0], max(1, row_bytes), self._hub.config.write_bytes_max)
        ]
        self._enqueue(pieces, raw.numel())

    def _encoded_bytes(self, tokens: int) -> int:
        return self._codec.encoded_bytes(tokens, self._layout, self._codec_config)

    def _enqueue(self, pieces: list[_Piece], raw_bytes: int) -> None:
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
            piece = self._pieces[0] if self._pieces else None
            if self._complete and piece is None and not self._writes and self._error is None:
                self._succeeded = True
        if self._succeeded:
            return self._succeed(now_s)
        if piece is not None and now_s < piece.not_before_s:
            piece = None
            retrying = True
        else:
            retrying = False
        if piece is not None and len(self._writes) < self._hub.config.writes_inflight_max and self._start(piece):
            worked = True
        if worked:
            return Turn.WORKED
        return Turn.WAITING if piece is not None or retrying or self._writes else Turn.IDLE

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
                self._retry(write.piece, write.transport, error)
                progressed = True
                continue
            self._writes.remove(write)
            progressed = True
            if write.piece.payload is not None:
                self._payloads.append(write.piece.payload)
                self.bytes_sent += write.piece.nbytes
            self._hub.report(self._target, write.transport, failed=False)
        return progressed

    def _start(self, piece: _Piece) -> bool:
        """Encode and submit the first piece of the queue; False if staging memory must be waited for."""
        link_name = ""
        try:
            link = self._hub.connect(self._target)
            link_name = link.transport
            self._place(piece)
            start_bytes = self._reservation.extent.first_page * self._reservation.page_bytes
            staged = link.stage(start_bytes + piece.offset_bytes, piece.nbytes)
        except OverloadedError as error:
            return self._stall(error)
        except TransportError as error:
            self._take(piece)
            self._retry(piece, link_name, error)
            return True
        except PrismServeError as error:
            self._stop(error)
            return True
        self._stalled_since_s = None
        self._take(piece)
        try:
            self._encode(piece, staged)
        except (PrismServeError, RuntimeError, ValueError, TypeError, LookupError) as error:
            self._stop(error if isinstance(error, PrismServeError) else _encode_failure(piece, error))
            return True
        finally:
            if piece.payload is None:
                staged.discard()
        self._submit(piece, staged, link_name)
        return True

    def _submit(self, piece: _Piece, staged: StagedWrite, transport: str) -> None:
        if piece.payload is None:
            message = "a piece was submitted before it was encoded"
            raise TransferError(message)
        lease_id, generation = self._reservation.lease_id, self._reservation.extent.generation
        try:
            handle = staged.submit(encode_payload(lease_id, generation, piece.payload))
        except TransportError as error:
            self._retry(piece, transport, error)
            return
        self.transport = transport
        self._writes.append(_Write(piece, handle, transport))

    def _place(self, piece: _Piece) -> None:
        if piece.offset_bytes >= 0:
            return
        room = self._reservation.extent.pages * self._reservation.page_bytes
        if self._cursor + piece.nbytes > room:
            message = f"the reservation of {room} bytes is too small: {self._cursor + piece.nbytes} bytes are needed"
            raise TransferError(message)
        piece.offset_bytes = self._cursor
        self._cursor += aligned(piece.nbytes)

    def _take(self, piece: _Piece) -> None:
        with self._lock:
            if self._pieces and self._pieces[0] is piece:
                self._pieces.popleft()

    def _encode(self, piece: _Piece, staged: StagedWrite) -> None:
        """Fill the staged buffer; the checksum is over the private encoded bytes where there are any."""
        if piece.raw is not None:
            encoded: torch.Tensor = piece.raw
        elif piece.read is not None:
            keys, values = piece.read(piece.layer, piece.start_token, piece.tokens)
            if isinstance(self._codec, EncodesInto):
                self._codec.encode_into(keys, values, self._codec_config, staged.buffer)
                encoded = staged.buffer
            else:
                encoded = self._codec.encode(keys, values, self._codec_config)
        else:
            message = "a piece has nothing to send"
            raise TransferError(message)
        if encoded is not staged.buffer:
            staged.buffer.copy_(encoded)
        digest = checksum((encoded if encoded.device.type == "cpu" else staged.buffer).numpy())
        piece.payload = Payload(piece.layer, piece.start_token, piece.tokens, piece.offset_bytes, piece.nbytes, digest)

    def _retry(self, piece: _Piece, transport: str, error: TransportError) -> None:
        """Put the piece back, to go over the next link; the same bytes at the same place, so repeating is harmless."""
        if transport:
            self._hub.report(self._target, transport, failed=True)
        piece.payload = None
        piece.attempts += 1
        piece.not_before_s = self._hub.clock() + _RETRY_PAUSE_S * 2**piece.attempts
        _log.warning("a KV write to worker %s over %s failed: %s", self._target.worker_id, transport or "-", error)
        if piece.attempts >= self._hub.config.write_attempts:
            self._stop(error)
            return
        with self._lock:
            if self._error is None:
                self._pieces.appendleft(piece)

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


def _encode_failure(piece: _Piece, error: Exception) -> TransferError:
    failure = TransferError(f"layer {piece.layer}, token {piece.start_token} cannot be encoded: {error}")
    failure.__cause__ = error
    return failure
