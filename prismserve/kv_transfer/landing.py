"""What lands under one lease: each piece is copied out of shared memory, verified, decoded and handed on, once."""

from __future__ import annotations

import enum
import threading
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

import torch

from prismserve.compression import loader
from prismserve.compression.wire import table
from prismserve.core.errors import ChecksumMismatchError, DeadlineExceededError, PrismServeError, TransferError
from prismserve.core.types import Extent, KVLayout, Manifest, Payload
from prismserve.kv_transfer.arena import Arena
from prismserve.kv_transfer.conversion import convert
from prismserve.kv_transfer.manifest import Expected
from prismserve.kv_transfer.plan import RAW_LAYER
from prismserve.kv_transfer.wire import checksum


class KVSink(Protocol):
    """Takes verified KV; copies before it returns, does not call the receiver."""

    def __call__(self, layer: int, start_token: int, keys: torch.Tensor, values: torch.Tensor, /) -> None:
        """``keys`` and ``values``: [T, kv_heads, head_dim] in the layout's dtype."""
        ...


class RawSink(Protocol):
    """Takes verified rows of an embedding; copies before it returns, does not call the receiver."""

    def __call__(self, start_token: int, tokens: int, data: torch.Tensor, /) -> None:
        """``data``: uint8, 1-D, the bytes of ``tokens`` rows."""
        ...


class Outcome(enum.Enum):
    """What became of one look at a piece."""

    TAKEN = "taken"
    DUPLICATE = "duplicate"
    MISMATCH = "mismatch"
    REFUSED = "refused"
    ENDED = "ended"


@dataclass(frozen=True, slots=True)
class Settled:
    """What one call of :meth:`Landing.settle` achieved: is all there, and what this call took over or found damaged."""

    complete: bool
    payloads: int = 0
    nbytes: int = 0
    mismatches: int = 0


class Scratch:
    """Private memory that pieces are verified in, so that what was verified is what is decoded.

    Between a checksum over shared memory and a decode from it a late writer could change the bytes.
    """

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def copy(self, source: torch.Tensor) -> torch.Tensor:
        """A private copy of ``source`` (uint8, 1-D), valid until the next call."""
        nbytes = source.numel()
        if self._buffer.numel() < nbytes:
            self._buffer = torch.empty(nbytes, dtype=torch.uint8)
        taken = self._buffer[:nbytes]
        taken.copy_(source)
        return taken


class Landing:
    """One lease at the receiver. ``take`` and ``settle`` run on the receiver thread, ``end`` on any.

    Attributes:
        lease_id: of the lease.
        extent: its pages.
        expected: what it was granted for.
        committed: the future of the commit; None before it.
    """

    def __init__(
        self,
        lease_id: int,
        extent: Extent,
        expected: Expected,
        arena: Arena,
        layout: KVLayout,
        sinks: tuple[KVSink | None, RawSink | None],
    ) -> None:
        self.lease_id = lease_id
        self.extent = extent
        self.expected = expected
        self.committed: Future[None] | None = None
        self.deadline_s = 0.0
        self._arena = arena
        self._layout = layout
        self._source = expected.source_layout or layout
        self._sink, self._raw_sink = sinks
        self._codecs = [(loader.codec(spec.name), loader.config_of(spec, "codec")) for spec in table(expected.codec)]
        self._manifest: Manifest | None = None
        self._taken: dict[tuple[int, int], Payload] = {}
        self._mismatched: dict[tuple[int, int], Payload] = {}
        self._looked = False
        self._running = threading.Lock()
        self._ended = False

    def commit(self, manifest: Manifest, deadline_s: float) -> Future[None]:
        """Keep a manifest that has been verified; its bytes are settled on the receiver thread."""
        self._manifest = manifest
        self.deadline_s = deadline_s
        self.committed = Future()
        # Running from the start: a caller that stops waiting must not be able to cancel it under the receiver thread.
        self.committed.set_running_or_notify_cancel()
        return self.committed

    def take(self, payload: Payload, scratch: Scratch, *, notified: bool = False) -> Outcome:
        """Verify one piece and hand it on, if it is new.

        Args:
            payload: where it lies and what it must be.
            scratch: of the receiver thread.
            notified: whether the sender has said that it is there, so that a mismatch means damage.

        Raises:
            PrismServeError: the sink or the codec refused it; the transfer cannot succeed any more.
        """
        with self._running:
            if self._ended:
                return Outcome.ENDED
            key = (payload.layer, payload.start_token)
            known = self._taken.get(key)
            if known is not None:
                return Outcome.DUPLICATE if known == payload else Outcome.REFUSED
            if not self._possible(payload):
                return Outcome.REFUSED
            data = scratch.copy(self._arena.view(self.extent, payload.offset_bytes, payload.encoded_bytes))
            if checksum(data.numpy()) != payload.checksum:
                if notified:
                    self._mismatched[key] = payload
                return Outcome.MISMATCH
            self._deliver(payload, data)
            self._taken[key] = payload
            return Outcome.TAKEN

    def _possible(self, payload: Payload) -> bool:
        """Whether a payload can belong to this lease; everything in it came over the wire."""
        end_bytes = payload.offset_bytes + payload.encoded_bytes
        end_token = payload.start_token + payload.tokens
        if payload.tokens < 1 or end_token > self.expected.prompt_tokens:
            return False
        if end_bytes > self.extent.pages * self._arena.page_bytes:
            return False
        if payload.layer == RAW_LAYER:
            return self._raw_sink is not None and payload.encoded_bytes % payload.tokens == 0
        if self._sink is None or payload.layer >= self._source.layers or payload.codec >= len(self._codecs):
            return False
        codec, config = self._codecs[payload.codec]
        return payload.start_token >= self.expected.cached_tokens and payload.encoded_bytes == codec.encoded_bytes(
            payload.tokens, self._source, config
        )

    def _deliver(self, payload: Payload, data: torch.Tensor) -> None:
        try:
            if payload.layer == RAW_LAYER:
                if self._raw_sink is not None:
                    self._raw_sink(payload.start_token, payload.tokens, data)
            elif self._sink is not None:
                codec, config = self._codecs[payload.codec]
                decoded = codec.decode(data, payload.tokens, self._source, config)
                keys, values = (convert(side, self._source, self._layout) for side in decoded)
                self._sink(payload.layer, payload.start_token, keys, values)
        except PrismServeError:
            raise
        except Exception as error:
            message = f"layer {payload.layer}, token {payload.start_token} could not be taken over: {error}"
            raise TransferError(message, request_id=self.expected.request_id) from error

    def settle(self, scratch: Scratch, now_s: float) -> Settled:
        """After a commit: look at what has not arrived.

        A payload whose notification was lost is found through the manifest; one that was notified and does not match
        its checksum now either has been damaged.

        Raises:
            ChecksumMismatchError: damaged, or other bytes were taken over than the manifest states.
            DeadlineExceededError: something has not arrived in time.
            PrismServeError: the sink or the codec refused a piece.
        """
        if self._manifest is None:
            message = "a lease was settled before its commit"
            raise TransferError(message)
        wanted = {(payload.layer, payload.start_token): payload for payload in self._manifest.payloads}
        for key, payload in self._taken.items():
            if wanted.get(key) != payload:
                message = f"layer {key[0]}, token {key[1]}: the manifest states other bytes than arrived"
                raise ChecksumMismatchError(message, request_id=self.expected.request_id)
        late = now_s >= self.deadline_s
        payloads = nbytes = mismatches = 0
        missing: Payload | None = None
        for key, payload in wanted.items():
            if key in self._taken:
                continue
            notified = self._mismatched.get(key) == payload
            if notified or late or not self._looked:
                outcome = self.take(payload, scratch)
                if outcome is Outcome.TAKEN:
                    payloads += 1
                    nbytes += payload.encoded_bytes
                    continue
                if outcome is Outcome.REFUSED:
                    message = f"layer {payload.layer}, token {payload.start_token} does not belong to the lease"
                    raise TransferError(message, request_id=self.expected.request_id)
                mismatches += outcome is Outcome.MISMATCH
                if notified and outcome is Outcome.MISMATCH:
                    raise self._damaged(payload)
            missing = payload
        self._looked = True
        if missing is not None and late:
            message = f"layer {missing.layer}, token {missing.start_token} did not arrive intact in time"
            raise DeadlineExceededError(message, request_id=self.expected.request_id)
        return Settled(missing is None, payloads, nbytes, mismatches)

    def _damaged(self, payload: Payload) -> ChecksumMismatchError:
        message = (
            f"layer {payload.layer}, tokens {payload.start_token} to {payload.start_token + payload.tokens}: "
            f"the bytes that arrived differ from their checksum"
        )
        return ChecksumMismatchError(message, request_id=self.expected.request_id)

    @property
    def stopped(self) -> bool:
        """Whether the lease is out of service."""
        return self._ended

    def stop(self) -> None:
        """Take out of service; when this returns no sink is running or will run."""
        # Before the wait, so that it is for the piece under way only and not for those that follow.
        self._ended = True
        with self._running:
            pass

    def resolve(self, error: PrismServeError | None) -> None:
        """Settle the future of the commit, if there was one."""
        if self.committed is None:
            return
        if error is None:
            self.committed.set_result(None)
        else:
            self.committed.set_exception(error)
