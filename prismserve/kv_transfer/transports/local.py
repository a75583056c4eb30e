"""Both ends in one process: the sender encodes into the receiver's arena, the notification is a queue entry."""

from __future__ import annotations

import os
import secrets
import threading
from collections import deque
from collections.abc import Mapping
from typing import Any, ClassVar, Final
from weakref import WeakValueDictionary

import torch

from prismserve.core.config import FrozenConfig
from prismserve.core.errors import TransportError
from prismserve.kv_transfer.arena import Arena
from prismserve.kv_transfer.config import TransferConfig
from prismserve.kv_transfer.transports.base import POLL_BATCH_MAX, check_range, parse_endpoint

_QUEUE_MAX: Final = 65536
_OPEN: Final[WeakValueDictionary[str, LocalTransport]] = WeakValueDictionary()
"""The open ends of this process by token: how two workers that share nothing else find each other."""


class LocalEndpoint(FrozenConfig):
    """Names one end; only the process that made it knows the token."""

    token: str


class _Done:
    """A write that was complete when it was submitted."""

    def poll(self) -> bool:
        return True

    def cancel(self) -> None:
        """Nothing is held."""


class LocalTransport:
    """One end within this process."""

    name: ClassVar[str] = "local"

    def __init__(self, worker_id: str, arena: Arena, config: TransferConfig) -> None:  # noqa: ARG002 - one constructor
        self._arena = arena
        self._token = secrets.token_hex(16)
        self._queue: deque[bytes] = deque()
        self._lock = threading.Lock()
        self._event_fd: int | None = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        _OPEN[self._token] = self

    def endpoint(self) -> Mapping[str, Any]:
        """The token of this end."""
        return LocalEndpoint(token=self._token).model_dump()

    def reachable(self, endpoint: Mapping[str, Any]) -> bool:
        """Whether the other end was opened in this process."""
        return parse_endpoint(LocalEndpoint, endpoint, self.name).token in _OPEN

    def connect(self, endpoint: Mapping[str, Any]) -> LocalLink:
        """A link to the other end; TransportError if it has closed."""
        peer = _OPEN.get(parse_endpoint(LocalEndpoint, endpoint, self.name).token)
        if peer is None:
            message = "the peer is not open in this process"
            raise TransportError(message)
        return LocalLink(peer)

    def poll(self) -> list[bytes]:
        """What peers have queued."""
        with self._lock:
            if self._event_fd is None:
                return []
            if self._queue:
                taken = [self._queue.popleft() for _ in range(min(len(self._queue), POLL_BATCH_MAX))]
                if not self._queue:
                    os.eventfd_read(self._event_fd)
                return taken
        return []

    def fileno(self) -> int | None:
        """Readable while notifications wait."""
        return self._event_fd

    def close(self) -> None:
        """Refuse further writes."""
        _OPEN.pop(self._token, None)
        with self._lock:
            if self._event_fd is not None:
                os.close(self._event_fd)
                self._event_fd = None

    def memory(self) -> tuple[torch.Tensor, int]:
        """The arena and how much of it may be written."""
        return self._arena.memory, self._arena.landing_bytes

    def deliver(self, notification: bytes) -> None:
        """Queue a notification; TransportError if closed or the queue is full."""
        with self._lock:
            if self._event_fd is None or len(self._queue) >= _QUEUE_MAX:
                message = "the peer has closed" if self._event_fd is None else f"{_QUEUE_MAX} notifications wait"
                raise TransportError(message)
            self._queue.append(notification)
            os.eventfd_write(self._event_fd, 1)


class LocalLink:
    """To another end in this process."""

    def __init__(self, peer: LocalTransport) -> None:
        self.transport = LocalTransport.name
        self._peer = peer

    def stage(self, offset_bytes: int, nbytes: int) -> LocalWrite:
        """The peer's memory itself."""
        memory, landing_bytes = self._peer.memory()
        check_range(offset_bytes, nbytes, landing_bytes)
        return LocalWrite(self._peer, memory[offset_bytes : offset_bytes + nbytes])

    def notify(self, notification: bytes) -> _Done:
        """Queue it at the peer."""
        self._peer.deliver(notification)
        return _Done()

    def close(self) -> None:
        """Nothing is held."""


class LocalWrite:
    """Encodes straight into the peer's arena."""

    def __init__(self, peer: LocalTransport, buffer: torch.Tensor) -> None:
        self.buffer = buffer
        self._peer = peer

    def submit(self, notification: bytes) -> _Done:
        """The bytes are there already; say so."""
        self._peer.deliver(notification)
        return _Done()

    def discard(self) -> None:
        """Nothing is held."""


TRANSPORT = LocalTransport
