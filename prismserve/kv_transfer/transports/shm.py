"""Same node: the sender maps the receiver's arena and encodes into it; an AF_UNIX datagram is the notification.

The datagram socket lives in the abstract namespace under 128 random bits, so no file can remain. Every datagram
carries the kernel's word on who sent it, and another user's is dropped unread.
"""

from __future__ import annotations

import errno
import os
import secrets
import socket
import struct
import time
from collections.abc import Mapping
from typing import Any, ClassVar, Final

import torch
from pydantic import Field

from prismserve.core.config import FrozenConfig
from prismserve.core.errors import ConfigurationError, TransportError
from prismserve.kv_transfer.arena import Arena, ArenaIdentity, map_peer
from prismserve.kv_transfer.config import TransferConfig
from prismserve.kv_transfer.node import NodeIdentity, this_node
from prismserve.kv_transfer.transports.base import POLL_BATCH_MAX, check_range, parse_endpoint
from prismserve.kv_transfer.wire import NOTIFICATION_BYTES_MAX

_CREDENTIALS: Final = struct.Struct("iII")
"""``struct ucred``: pid, uid, gid."""
_RETRY_ERRORS: Final = frozenset({errno.EAGAIN, errno.ENOBUFS, errno.EINTR})


class ShmEndpoint(FrozenConfig):
    """Where the arena and the socket are, and on which node that means anything."""

    node: NodeIdentity
    arena: ArenaIdentity
    socket: str = Field(pattern=r"^prismserve-[0-9a-f]{32}$")


class ShmTransport:
    """One worker's end on this node."""

    name: ClassVar[str] = "shm"

    def __init__(self, worker_id: str, arena: Arena, config: TransferConfig) -> None:  # noqa: ARG002 - one constructor
        self._arena = arena
        self._config = config
        self._node = this_node()
        self._address = f"prismserve-{secrets.token_hex(16)}"
        try:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
            self._socket.bind(f"\0{self._address}")
        except OSError as error:
            message = f"transport shm: a notification socket cannot be opened: {error.strerror}"
            raise ConfigurationError(message, field="transfer.transports") from error

    def endpoint(self) -> Mapping[str, Any]:
        """Node, arena and socket."""
        return ShmEndpoint(node=self._node, arena=self._arena.identity(), socket=self._address).model_dump()

    def reachable(self, endpoint: Mapping[str, Any]) -> bool:
        """Whether the peer shares this node's kernel, namespaces and user."""
        return parse_endpoint(ShmEndpoint, endpoint, self.name).node == self._node

    def connect(self, endpoint: Mapping[str, Any]) -> ShmLink:
        """Map the peer's arena; TransportError if it is gone or not what the endpoint says."""
        peer = parse_endpoint(ShmEndpoint, endpoint, self.name)
        if peer.node != self._node:
            message = "the peer is not on this node"
            raise TransportError(message)
        return ShmLink(peer, map_peer(peer.arena), self._config.write_timeout_s)

    def poll(self) -> list[bytes]:
        """Datagrams of this user's processes; longer ones than any notification are dropped."""
        taken: list[bytes] = []
        for _ in range(POLL_BATCH_MAX):
            try:
                raw, ancillary, flags, _ = self._socket.recvmsg(
                    NOTIFICATION_BYTES_MAX, socket.CMSG_SPACE(_CREDENTIALS.size)
                )
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno == errno.EBADF:
                    break
                message = f"the notification socket failed: {error.strerror}"
                raise TransportError(message) from error
            if not flags & socket.MSG_TRUNC and _sender_uid(ancillary) == self._node.uid:
                taken.append(raw)
        return taken

    def fileno(self) -> int | None:
        """The notification socket."""
        number = self._socket.fileno()
        return None if number < 0 else number

    def close(self) -> None:
        """Close the socket; its name goes with it."""
        self._socket.close()


class ShmLink:
    """To a peer on this node."""

    def __init__(self, peer: ShmEndpoint, memory: torch.Tensor, timeout_s: float) -> None:
        self.transport = ShmTransport.name
        self._landing_bytes = peer.arena.landing_bytes
        self._memory: torch.Tensor | None = memory
        self._timeout_s = timeout_s
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        try:
            self._socket.connect(f"\0{peer.socket}")
        except OSError as error:
            self._socket.close()
            message = f"the peer's notification socket is gone: {error.strerror}"
            raise TransportError(message) from error

    def stage(self, offset_bytes: int, nbytes: int) -> ShmWrite:
        """The peer's memory itself."""
        if self._memory is None:
            message = "the link is closed"
            raise TransportError(message)
        check_range(offset_bytes, nbytes, self._landing_bytes)
        return ShmWrite(self, self._memory[offset_bytes : offset_bytes + nbytes])

    def notify(self, notification: bytes) -> ShmHandle:
        """Send one datagram, retried while the peer's queue is full."""
        return ShmHandle(self._socket, notification, time.monotonic() + self._timeout_s)

    def close(self) -> None:
        """Unmap once no write uses the memory."""
        self._memory = None
        self._socket.close()


class ShmWrite:
    """Encodes straight into the peer's arena."""

    def __init__(self, link: ShmLink, buffer: torch.Tensor) -> None:
        self.buffer = buffer
        self._link = link

    def submit(self, notification: bytes) -> ShmHandle:
        """The bytes are there already; say so."""
        return self._link.notify(notification)

    def discard(self) -> None:
        """Nothing is held."""


class ShmHandle:
    """A datagram on its way: the peer's queue is short (``net.unix.max_dgram_qlen``), so sending may take turns."""

    def __init__(self, peer: socket.socket, notification: bytes, deadline_s: float) -> None:
        self._peer = peer
        self._notification = notification
        self._deadline_s = deadline_s
        self._done = False

    def poll(self) -> bool:
        """Try to send; TransportError if the peer is gone or has not read for the write timeout."""
        if self._done:
            return True
        try:
            self._peer.send(self._notification)
        except OSError as error:
            if error.errno in _RETRY_ERRORS and time.monotonic() < self._deadline_s:
                return False
            message = f"the peer does not take notifications: {os.strerror(error.errno or errno.EIO)}"
            raise TransportError(message) from error
        self._done = True
        return True

    def cancel(self) -> None:
        """Do not send it any more."""
        self._done = True


def _sender_uid(ancillary: list[tuple[int, int, bytes]]) -> int | None:
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_CREDENTIALS and len(data) >= _CREDENTIALS.size:
            return int(_CREDENTIALS.unpack_from(data)[1])
    return None


TRANSPORT = ShmTransport
