"""torch.distributed point to point: NCCL between GPUs, gloo between CPUs, the same code.

Each worker serves a small store on ``transfer.host``. A sender that found its address and its 128-bit token in the
registry joins there, and the two form a process group of their own (:mod:`._group`). One thread per link sends, one per
incoming link receives into the arena; both exist because neither library can be asked without waiting. The receiver
checks every range, and acknowledges a write when its bytes are in the arena and its notification is queued.
"""

from __future__ import annotations

import logging
import os
import queue
import secrets
import threading
import time
from collections import deque
from collections.abc import Mapping
from typing import Any, ClassVar, Final

import torch
from pydantic import Field

from prismserve.core.config import FrozenConfig, PositiveInt
from prismserve.core.errors import OverloadedError, TransferError, TransportError
from prismserve.core.types import Extent
from prismserve.kv_transfer.arena import Arena
from prismserve.kv_transfer.config import TransferConfig
from prismserve.kv_transfer.transports import _group as p2p
from prismserve.kv_transfer.transports.base import POLL_BATCH_MAX, check_range, parse_endpoint

_LINKS_MAX: Final = 64
_QUEUE_MAX: Final = 65536
_LOOK_S: Final = 0.02
_CLOSE_S: Final = 0.2
_JOIN_S: Final = 5.0
_ACK: Final = 2
_log = logging.getLogger(__name__)


class NcclEndpoint(FrozenConfig):
    """Where to join, the token without which nobody is let in, and what moves the bytes there."""

    host: str = Field(min_length=1, max_length=256)
    port: int = Field(ge=1, le=65535)
    token: str = Field(pattern=r"^[0-9a-f]{32}$")
    device: str = Field(pattern=r"^(cpu|cuda)$")
    landing_bytes: PositiveInt


class NcclTransport:
    """One worker's end."""

    name: ClassVar[str] = "nccl"

    def __init__(self, worker_id: str, arena: Arena, config: TransferConfig) -> None:
        self.arena = arena
        self.config = config
        self.device = p2p.device()
        self._token = secrets.token_hex(16)
        self._store, self._port = p2p.serve_store(config.host, config.write_timeout_s)
        self._queue: deque[bytes] = deque()
        self._lock = threading.Lock()
        self._event_fd: int | None = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._incoming: dict[threading.Thread, p2p.Group | None] = {}
        self._closed = threading.Event()
        self._accepting = threading.Thread(target=self._accept, name=f"kv-nccl-{worker_id}", daemon=True)
        self._accepting.start()

    def endpoint(self) -> Mapping[str, Any]:
        """Address and token of the store."""
        return NcclEndpoint(
            host=self.config.host,
            port=self._port,
            token=self._token,
            device=self.device,
            landing_bytes=self.arena.landing_bytes,
        ).model_dump()

    def reachable(self, endpoint: Mapping[str, Any]) -> bool:
        """Any peer but this one; whether its address answers shows when the link opens."""
        return parse_endpoint(NcclEndpoint, endpoint, self.name).token != self._token

    def connect(self, endpoint: Mapping[str, Any]) -> NcclLink:
        """A link that sets itself up on its own thread; until it has, ``stage`` says overloaded."""
        return NcclLink(self, parse_endpoint(NcclEndpoint, endpoint, self.name))

    def poll(self) -> list[bytes]:
        """What peers have announced and acknowledged writes brought."""
        with self._lock:
            if self._event_fd is None or not self._queue:
                return []
            taken = [self._queue.popleft() for _ in range(min(len(self._queue), POLL_BATCH_MAX))]
            if not self._queue:
                os.eventfd_read(self._event_fd)
            return taken

    def fileno(self) -> int | None:
        """Readable while notifications wait."""
        return self._event_fd

    def close(self) -> None:
        """Refuse joiners, end every incoming link and join their threads."""
        if self._closed.is_set():
            return
        self._closed.set()
        with self._lock:
            groups = [group for group in self._incoming.values() if group is not None]
            threads = [*self._incoming, self._accepting]
        for group in groups:
            group.close()
        deadline_s = time.monotonic() + _JOIN_S
        for thread in threads:
            thread.join(max(0.0, deadline_s - time.monotonic()))
            if thread.is_alive():
                _log.warning("thread %s of transport nccl did not end in time", thread.name)
        with self._lock:
            if self._event_fd is not None:
                os.close(self._event_fd)
                self._event_fd = None

    # ---- incoming -------------------------------------------------------------------------------------------------

    def _accept(self) -> None:
        """Let joiners in, one after the other, in the order of the numbers the store gave them."""
        number = 1
        while not self._closed.is_set():
            key = f"{self._token}/join/{number}"
            # Asked for rather than waited for: a wait would run out, and be logged by torch, twice a second.
            if not self._store.check([key]):
                self._closed.wait(_LOOK_S)
                continue
            with self._lock:
                room = len(self._incoming) < _LINKS_MAX
            if room and not self._closed.is_set():
                name = f"{self._token}/{number}"
                thread = threading.Thread(target=self._serve, args=(name,), name=f"kv-nccl-in-{number}", daemon=True)
                with self._lock:
                    self._incoming[thread] = None
                thread.start()
            self._store.delete_key(key)
            number += 1

    def _serve(self, name: str) -> None:
        """Receive from one peer until it ends, falls silent or says something that cannot be."""
        thread, timeout_s = threading.current_thread(), self.config.write_timeout_s
        group: p2p.Group | None = None
        try:
            store = p2p.reach_store(self.config.host, self._port, timeout_s)
            group = p2p.Group(store, name, p2p.SERVER, self.config.host, self.device, timeout_s)
            with self._lock:
                self._incoming[thread] = group
            raw, ack = torch.empty(p2p.FRAME_BYTES, dtype=torch.uint8), torch.ones(1, dtype=torch.uint8)
            while not self._closed.is_set():
                group.receive(raw, p2p.SILENCE_S)
                offset_bytes, nbytes, notification = p2p.parse(raw, self.arena.landing_bytes)
                if nbytes:
                    group.receive_bytes(self.arena.memory[offset_bytes : offset_bytes + nbytes], timeout_s)
                if notification:
                    self._deliver(notification)
                    group.send(ack, timeout_s, _ACK)
        except (*p2p.FOREIGN_ERRORS, TransferError) as error:
            _log.debug("an incoming nccl link ended: %s", error)
        finally:
            with self._lock:
                self._incoming.pop(thread, None)
            if group is not None:
                group.close()

    def _deliver(self, notification: bytes) -> None:
        with self._lock:
            if self._event_fd is None or len(self._queue) >= _QUEUE_MAX:
                message = "the worker is closing, or its queue of notifications is full"
                raise TransferError(message)
            self._queue.append(notification)
            os.eventfd_write(self._event_fd, 1)


class NcclLink:
    """To one peer: a queue of writes and the thread that sends them."""

    def __init__(self, owner: NcclTransport, peer: NcclEndpoint) -> None:
        self.transport = NcclTransport.name
        self._owner = owner
        self._peer = peer
        self._writes: queue.Queue[NcclHandle] = queue.Queue(owner.config.writes_inflight_max * 4)
        self._ready = threading.Event()
        self._closed = threading.Event()
        self._error = ""
        self._group: p2p.Group | None = None
        self._thread = threading.Thread(target=self._run, name="kv-nccl-out", daemon=True)
        self._thread.start()

    def stage(self, offset_bytes: int, nbytes: int) -> NcclWrite:
        """Pages of this worker's staging region."""
        self._check()
        check_range(offset_bytes, nbytes, self._peer.landing_bytes)
        if not self._ready.is_set() or self._writes.full():
            message = "the link is being set up, or its queue is full"
            raise OverloadedError(message, retry_after_s=0.01)
        return NcclWrite(self, self._owner.arena, offset_bytes, nbytes)

    def notify(self, notification: bytes) -> NcclHandle:
        """A frame without bytes."""
        return self.enqueue(NcclHandle(self._owner, p2p.frame(0, 0, notification), None, None))

    def enqueue(self, handle: NcclHandle) -> NcclHandle:
        """Have it sent; TransportError if the link is broken or full."""
        self._check()
        try:
            self._writes.put_nowait(handle)
        except queue.Full:
            message = "the link's queue is full"
            raise TransportError(message) from None
        return handle

    def close(self) -> None:
        """End the connection; writes that wait or are under way fail."""
        self._closed.set()
        group = self._group
        if group is not None:
            group.close()

    def _check(self) -> None:
        if self._closed.is_set() or self._error:
            raise TransportError(self._error or "the link is closed")

    # ---- the link's thread ----------------------------------------------------------------------------------------

    def _run(self) -> None:
        handle: NcclHandle | None = None
        timeout_s = self._owner.config.write_timeout_s
        try:
            self._group = group = self._join(timeout_s)
            self._ready.set()
            ack, silence = torch.empty(1, dtype=torch.uint8), p2p.frame(0, 0, b"")
            said_s = time.monotonic()
            while not self._closed.is_set():
                try:
                    handle = self._writes.get(timeout=_CLOSE_S)
                except queue.Empty:
                    if time.monotonic() >= said_s + p2p.KEEP_ALIVE_S:
                        group.send(silence, timeout_s)
                        said_s = time.monotonic()
                    continue
                said_s = time.monotonic()
                if handle.begin():
                    group.send(handle.frame, timeout_s)
                    if handle.data is not None:
                        group.send_bytes(handle.data, timeout_s)
                    group.receive(ack, timeout_s, _ACK)
                handle.end("")
                handle = None
        except p2p.FOREIGN_ERRORS as error:
            self._error = f"the nccl link to {self._peer.host} failed: {error}"
        finally:
            self._error = self._error or "the link is closed"
            if handle is not None:
                handle.end(self._error)
            while not self._writes.empty():
                self._writes.get_nowait().end(self._error)
            if self._group is not None:
                self._group.close()

    def _join(self, timeout_s: float) -> p2p.Group:
        peer = self._peer
        store = p2p.reach_store(peer.host, peer.port, timeout_s)
        number = store.add(f"{peer.token}/joins", 1)
        store.set(f"{peer.token}/join/{number}", "")
        on = "cuda" if peer.device == self._owner.device == "cuda" else "cpu"
        if on != peer.device:
            message = f"the peer moves bytes on {peer.device}, this worker on {self._owner.device}"
            raise ValueError(message)
        return p2p.Group(store, f"{peer.token}/{number}", p2p.CLIENT, self._owner.config.host, on, timeout_s)


class NcclWrite:
    """Staging pages bound for the peer."""

    def __init__(self, link: NcclLink, arena: Arena, offset_bytes: int, nbytes: int) -> None:
        self._link = link
        self._arena = arena
        self._offset_bytes = offset_bytes
        self._extent = arena.allocate_staging(nbytes)
        self.buffer: torch.Tensor = arena.view(self._extent, 0, nbytes)

    def submit(self, notification: bytes) -> NcclHandle:
        """Queue the frame and the bytes."""
        owner = self._link._owner  # noqa: SLF001 - one file, one idea
        try:
            frame = p2p.frame(self._offset_bytes, self.buffer.numel(), notification)
            return self._link.enqueue(NcclHandle(owner, frame, self.buffer, self._extent))
        except TransportError:
            self.discard()
            raise

    def discard(self) -> None:
        """Free the staging pages."""
        self._arena.free(self._extent)


class NcclHandle:
    """A write in the queue, under way, or over; the link's thread holds its pages while it sends them."""

    def __init__(
        self, owner: NcclTransport, frame: torch.Tensor, data: torch.Tensor | None, extent: Extent | None
    ) -> None:
        self.frame = frame
        self.data = data
        self._arena = owner.arena
        self._extent = extent
        self._lock = threading.Lock()
        self._cancelled = False
        self._over = False
        self._error = ""

    def begin(self) -> bool:
        """Whether it is to be sent at all. Link thread only."""
        with self._lock:
            return not self._cancelled

    def end(self, error: str) -> None:
        """It has been acknowledged, or never will be. Link thread only."""
        with self._lock:
            self._over, self._error = True, error
        if self._extent is not None:
            self._arena.free(self._extent)

    def poll(self) -> bool:
        """Whether the peer has acknowledged it; TransportError if the link broke."""
        with self._lock:
            if self._error and not self._cancelled:
                raise TransportError(self._error)
            return self._over or self._cancelled

    def cancel(self) -> None:
        """Do not send it if it has not begun; its pages are freed by the link's thread."""
        with self._lock:
            self._cancelled = True


TRANSPORT = NcclTransport
