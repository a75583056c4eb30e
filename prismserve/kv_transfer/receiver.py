"""Granting leases, verifying what lands under them, and handing verified KV on."""

from __future__ import annotations

import logging
import os
import select
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Final

from prismserve.core.errors import (
    ChecksumMismatchError,
    LeaseExpiredError,
    PrismServeError,
    TransferError,
    TransportError,
)
from prismserve.core.types import KVLayout, Manifest, Payload, Reservation
from prismserve.kv_transfer.conversion import Side, check_convertible
from prismserve.kv_transfer.hub import TransportHub
from prismserve.kv_transfer.landing import KVSink, Landing, Outcome, RawSink, Scratch, Settled
from prismserve.kv_transfer.leases import LeaseTable
from prismserve.kv_transfer.manifest import Expected, verify
from prismserve.kv_transfer.transports.base import Transport
from prismserve.kv_transfer.wire import decode_notification

_IDLE_WAIT_S: Final = 0.5
_QUIET_POLL_MAX_S: Final = 0.001
_QUARANTINE_POLL_S: Final = 0.02
# A look that brings nothing takes a few microseconds of processor time, one that moves bytes about 0.3 us a KiB.
_MOVED_S: Final = 50e-6
_REASONS_MAX: Final = 256
_MILLISECOND: Final = 0.001
_JOIN_S: Final = 10.0
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ReceiverStats:
    """Counters since start, but the first two, which are of now.

    Attributes:
        leases_open: leases that hold pages, quarantined ones included.
        leases_quarantined: leases that have ended while their sender may still be writing.
        transfers: leases whose manifest was met in full.
        payloads: pieces verified and decoded.
        bytes_received: encoded bytes of those.
        checksum_failures: pieces whose bytes differed from their checksum when they were looked at.
        notifications_duplicate: repeats, and those of leases that have ended.
        notifications_refused: malformed, or naming a lease or generation never granted, or impossible ranges.
        leases_expired: leases that ran out before a commit.
        failures: leases that ended otherwise without a verified transfer.
    """

    leases_open: int = 0
    leases_quarantined: int = 0
    transfers: int = 0
    payloads: int = 0
    bytes_received: int = 0
    checksum_failures: int = 0
    notifications_duplicate: int = 0
    notifications_refused: int = 0
    leases_expired: int = 0
    failures: int = 0


class Receiver:
    """The receiving side of one worker; its thread runs from construction to :meth:`close`.

    Args:
        hub: of this worker.
        layout: of this worker's KV.
    """

    def __init__(self, hub: TransportHub, layout: KVLayout) -> None:
        self._hub = hub
        self._layout = layout
        self._config = hub.config
        self._leases = LeaseTable(hub.arena.free, hub.config.leases_max)
        self._landings: dict[int, Landing] = {}
        self._commits: deque[Landing] = deque()
        self._reasons: OrderedDict[int, PrismServeError] = OrderedDict()
        self._scratch = Scratch()
        self._lock = threading.Lock()
        self._counts = ReceiverStats()
        self._closed = False
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._poller = select.poll()
        self._poller.register(self._wake_fd, select.POLLIN)
        self._silent: list[Transport] = []
        """Transports that cannot wake a sleeping thread."""
        self._moved = False
        """Whether the last look at them took processor time, as one does that moves a peer's bytes."""
        self._failing: set[str] = set()
        for transport in hub.opened:
            number = transport.fileno()
            if number is None:
                self._silent.append(transport)
            else:
                self._poller.register(number, select.POLLIN)
        self._thread = threading.Thread(target=self._run, name=f"kv-receive-{hub.worker_id}", daemon=True)
        self._thread.start()

    def reserve(
        self,
        expected: Expected,
        nbytes: int,
        sink: KVSink | None = None,
        *,
        raw_sink: RawSink | None = None,
        ttl_s: float | None = None,
    ) -> Reservation:
        """Lease pages for one transfer.

        Args:
            expected: whose KV, from whom, in what form.
            nbytes: room, see :func:`prismserve.kv_transfer.plan.reserve_bytes`.
            sink: called on the receiver thread for each verified piece of KV, before the commit, in any order, each
                piece once; it must copy the tensors before it returns, and must not block. What it writes may be
                published only when the future of :meth:`commit` has resolved.
            raw_sink: the same for an image embedding.
            ttl_s: shorter or longer than the configured ``lease_ttl_s``.

        Raises:
            OverloadedError: no room now, or too many leases.
            IncompatibleLayoutError: the sender's KV cannot be converted to this worker's layout.
            TransferError: the arena could never hold it, or the receiver is closed.
        """
        if expected.source_layout is not None:
            source = Side(expected.source_worker, expected.source_layout)
            check_convertible(source, Side(self._hub.worker_id, self._layout), expected.codec)
        with self._lock:
            if self._closed:
                raise TransferError("the worker is shutting down and receives no more KV")
            self._leases.check_room()
            extent = self._hub.arena.allocate(nbytes)
            wanted_s = self._config.lease_ttl_s if ttl_s is None else ttl_s
            lease = self._leases.grant(extent, wanted_s, self._hub.clock())
            self._landings[lease.lease_id] = Landing(
                lease.lease_id, extent, expected, self._hub.arena, self._layout, (sink, raw_sink)
            )
        self._wake()
        return Reservation(lease.lease_id, extent, self._hub.arena.page_bytes, expected.cached_tokens, wanted_s)

    def commit(self, lease_id: int, generation: int, manifest: Manifest) -> Future[None]:
        """Take the sender's statement of what it wrote; it has finished writing.

        Returns:
            A future that resolves once every payload has been verified and taken by the sink, or fails with
            LeaseExpiredError (no such lease; if it failed before, that failure), IncompatibleLayoutError (the sides differ), TransferError (the
            manifest is incomplete), ChecksumMismatchError (bytes differ), DeadlineExceededError (a payload did not
            arrive within ``notify_timeout_s``) or what the sink raised. Repeating a commit gives the same future.
        """
        with self._lock:
            try:
                self._leases.active(lease_id, generation)
            except LeaseExpiredError as error:
                return _failed(self._reasons.get(lease_id, error))
            landing = self._landings[lease_id]
            if landing.committed is not None:
                return landing.committed
            try:
                verify(manifest, landing.expected, self._layout, landing.extent.pages * self._hub.arena.page_bytes)
            except PrismServeError as error:
                refusal = error
            else:
                future = landing.commit(manifest, self._hub.clock() + self._config.notify_timeout_s)
                self._commits.append(landing)
                self._wake()
                return future
        self._end(lease_id, refusal, sender_stopped=True)
        return _failed(refusal)

    def cancel(self, lease_id: int) -> None:
        """End a lease; when this returns its sink is not running and will not be called again.

        The pages stay in quarantine until the sender says it has stopped, or two ttl have passed since the grant.
        Unknown ids are ignored. A future of its commit fails with LeaseExpiredError.
        """
        self._end(lease_id, LeaseExpiredError("the lease was cancelled"), sender_stopped=False)

    def release(self, lease_id: int) -> None:
        """As :meth:`cancel`, but the pages are free at once: the sender has said that it wrote nothing."""
        self._end(lease_id, LeaseExpiredError("the lease was not used"), sender_stopped=True)

    def expire(self, now_s: float | None = None) -> None:
        """End what has run out; the receiver thread does this on its own."""
        with self._lock:
            expired = self._leases.expire(self._hub.clock() if now_s is None else now_s)
            self._count(leases_expired=len(expired))
        for lease_id in expired:
            self._end(lease_id, LeaseExpiredError("the lease ran out"), sender_stopped=False)

    @property
    def stats(self) -> ReceiverStats:
        """Counters since start."""
        with self._lock:
            return replace(self._counts, leases_open=len(self._leases), leases_quarantined=self._leases.quarantined)

    def close(self) -> None:
        """End every lease and join the thread; TransferError if it does not end in time. May be called twice."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            leases = list(self._landings)
        for lease_id in leases:
            self._end(lease_id, LeaseExpiredError("the worker is shutting down"), sender_stopped=False)
        self._wake()
        self._thread.join(_JOIN_S)
        if self._thread.is_alive():
            raise TransferError(f"the receive thread did not end within {_JOIN_S} s")
        os.close(self._wake_fd)

    def _end(self, lease_id: int, error: PrismServeError | None, *, sender_stopped: bool) -> None:
        """Take a lease out of service; whoever finds it in the table does, so it happens once.

        Pages are freed only after the landing has ended, so that no look at them can be under way.
        """
        with self._lock:
            landing = self._landings.pop(lease_id, None)
            if landing is None:
                return
            self._leases.quarantine(lease_id)
            if error is not None:
                self._reasons[lease_id] = error
                if len(self._reasons) > _REASONS_MAX:
                    self._reasons.popitem(last=False)
            stopped = sender_stopped or landing.committed is not None
            ended_by_lease = isinstance(error, LeaseExpiredError)
            self._count(transfers=int(error is None), failures=int(error is not None and not ended_by_lease))
        landing.stop()
        if stopped:
            with self._lock:
                self._leases.finish(lease_id)
        landing.resolve(error)

    def _count(self, **increments: int) -> None:
        values = {name: getattr(self._counts, name) + amount for name, amount in increments.items()}
        self._counts = replace(self._counts, **values)

    def _wake(self) -> None:
        os.eventfd_write(self._wake_fd, 1)

    # ---- the receiver thread --------------------------------------------------------------------------------------

    def _run(self) -> None:
        pause_s = self._config.poll_interval_s
        arrived: list[bytes] = []
        moving = False
        while not self._closed:
            arrived += self._poll(self._hub.opened)
            for raw in arrived:
                self._accept(raw)
            self._settle()
            self.expire()
            busy = bool(arrived) or moving or self._moved
            pause_s = self._config.poll_interval_s if busy else min(pause_s * 1.25, _QUIET_POLL_MAX_S)
            arrived, moving = self._spin() if busy and self._silent else ([], False)
            if not arrived and not moving and self._wait(pause_s):
                pause_s = self._config.poll_interval_s

    def _spin(self) -> tuple[list[bytes], bool]:
        """Ask the silent transports without pause until one has something, there is other work, or for long enough.

        Whoever writes over them waits for this side to help. Every turn lets other threads of the process run.

        Returns:
            What has arrived, and whether a look moved bytes meanwhile: a large write is many looks long, and the next
            spin follows at once, behind what leases and manifests need.
        """
        moved = False
        until_s = self._hub.clock() + self._config.receive_spin_s
        while self._hub.clock() < until_s:
            arrived = self._poll(self._silent)
            moved = moved or self._moved
            if arrived or self._poller.poll(0):
                return arrived, moved
        return [], moved

    def _wait(self, pause_s: float) -> bool:
        """Sleep until there may be something to do; True if another thread asked for attention."""
        now_s = self._hub.clock()
        with self._lock:
            wake_s = self._leases.next_deadline_s()
            wait_s = _IDLE_WAIT_S if wake_s is None else wake_s - now_s
            if self._silent and self._landings:
                wait_s = min(wait_s, pause_s)
            elif self._silent and len(self._leases):
                wait_s = min(wait_s, _QUARANTINE_POLL_S)
            wait_s = min((wait_s, _IDLE_WAIT_S, *(landing.deadline_s - now_s for landing in self._commits)))
        # Rounded up: a wait of 0 ms until a deadline half a millisecond away would spin.
        for descriptor, _ in self._poller.poll(max(0.0, wait_s) * 1e3 if wait_s < _MILLISECOND else wait_s * 1e3 + 1):
            if descriptor == self._wake_fd:
                os.eventfd_read(self._wake_fd)
                return True
        return False

    def _poll(self, transports: Iterable[Transport]) -> list[bytes]:
        arrived: list[bytes] = []
        began_s = time.thread_time()
        for transport in transports:
            try:
                arrived.extend(transport.poll())
            except TransportError as error:
                if transport.name not in self._failing:
                    _log.warning("transport %s cannot be polled: %s", transport.name, error)
                self._failing.add(transport.name)
            else:
                self._failing.discard(transport.name)
        # Of this thread alone: waiting for a core or for the interpreter is not work.
        self._moved = bool(self._silent) and time.thread_time() - began_s > _MOVED_S
        return arrived

    def _accept(self, raw: bytes) -> None:
        try:
            note = decode_notification(raw)
        except TransferError as error:
            _log.debug("dropped a notification: %s", error)
            with self._lock:
                self._count(notifications_refused=1)
            return
        if note is None:
            return
        with self._lock:
            landing = self._landings.get(note.lease_id)
            if not self._leases.matches(note.lease_id, note.generation):
                ended = self._leases.ended(note.lease_id)
                self._count(notifications_duplicate=int(ended), notifications_refused=int(not ended))
                return
            if landing is None:
                if not note.payloads:
                    self._leases.finish(note.lease_id)
                else:
                    self._count(notifications_duplicate=1)
                return
        if not note.payloads:
            self._end(note.lease_id, LeaseExpiredError("the sender gave the transfer up"), sender_stopped=True)
            return
        for payload in note.payloads:
            self._take(landing, payload)

    def _take(self, landing: Landing, payload: Payload) -> None:
        try:
            outcome = landing.take(payload, self._scratch, notified=True)
        except PrismServeError as error:
            _log.warning("a transfer of worker %s was refused: %s", landing.expected.source_worker, error)
            self._end(landing.lease_id, error, sender_stopped=False)
            return
        with self._lock:
            self._count(
                payloads=int(outcome is Outcome.TAKEN),
                bytes_received=payload.encoded_bytes if outcome is Outcome.TAKEN else 0,
                checksum_failures=int(outcome is Outcome.MISMATCH),
                notifications_duplicate=int(outcome in {Outcome.DUPLICATE, Outcome.ENDED}),
                notifications_refused=int(outcome is Outcome.REFUSED),
            )

    def _settle(self) -> None:
        with self._lock:
            pending = list(self._commits)
        for landing in pending:
            error: PrismServeError | None = None
            try:
                settled = landing.settle(self._scratch, self._hub.clock())
            except PrismServeError as raised:
                error = raised
                settled = Settled(complete=True)
            with self._lock:
                self._count(
                    payloads=settled.payloads,
                    bytes_received=settled.nbytes,
                    checksum_failures=settled.mismatches + int(isinstance(error, ChecksumMismatchError)),
                )
                if not (settled.complete or landing.stopped):
                    continue
                self._commits.remove(landing)
            self._end(landing.lease_id, error, sender_stopped=True)


def _failed(error: PrismServeError) -> Future[None]:
    future: Future[None] = Future()
    future.set_exception(error)
    return future
